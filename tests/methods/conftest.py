from collections.abc import Iterator
from pathlib import Path

import pytest

from spo.config import LoraConfig
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from tests.models.tiny import make_tiny_denoiser, make_tiny_pipeline


@pytest.fixture(scope="module")
def family() -> str:
    """A test that needs another one parametrizes it."""
    return "sd15"


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def shared_policy(family: str, folder: Path) -> LatentDiffusion:
    denoiser = make_tiny_denoiser(family, folder)
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
    return denoiser


@pytest.fixture
def policy(shared_policy: LatentDiffusion) -> Iterator[LatentDiffusion]:
    """A policy that is the reference at first; what a test trains is undone."""
    parameters = shared_policy.network.parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    yield shared_policy
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data = value
        parameter.grad = None
