import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from spo.models.base import LatentDiffusion
from tests.models.tiny import FAMILIES, make_tiny_denoiser, make_tiny_pipeline


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
