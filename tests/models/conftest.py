import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from spo.config import LoraConfig
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.models.network import Pipeline
from tests.models.sampled import RANK, SAMPLING
from tests.models.tiny import FAMILIES, load_plainly, make_tiny_denoiser, make_tiny_pipeline, shake


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_folder(family, prediction_type="epsilon"): a saved random pipeline, made once."""

    @functools.cache
    def make(family: str, prediction_type: str = "epsilon") -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{prediction_type}")
        return make_tiny_pipeline(family, folder, prediction_type=prediction_type)

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def denoiser(family: str, tiny_folder: Callable[..., Path]) -> LatentDiffusion:
    return make_tiny_denoiser(family, tiny_folder(family))


@pytest.fixture
def make(family: str, tiny_folder: Callable[..., Path]) -> Callable[..., LatentDiffusion]:
    """make(**model): a new denoiser of the family, with the sampler of tests.models.sampled."""
    return lambda **model: make_tiny_denoiser(family, tiny_folder(family), sampling=SAMPLING, **model)


@pytest.fixture
def policy(make: Callable[..., LatentDiffusion]) -> LatentDiffusion:
    """A denoiser whose LoRA is not zero."""
    denoiser = make()
    add_lora(denoiser.network.module, LoraConfig(rank=RANK), seed=0)
    shake(denoiser)
    return denoiser


@pytest.fixture
def plain_pipeline(family: str, tiny_folder: Callable[..., Path]) -> Pipeline:
    """Without any of our code."""
    return load_plainly(tiny_folder(family))
