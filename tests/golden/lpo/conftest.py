"""The published LPO code's figures; README.md says how they came about."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_published import read_published_latent

LPO = Path(__file__).parent
PREFIX = {"lrm_sd15": "lrm15", "lrm_sdxl": "lrmxl"}


@pytest.fixture(scope="session")
def figures() -> dict[str, Tensor]:
    return load_file(LPO / "tensors.safetensors")


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    return json.loads((LPO / "meta.json").read_text(encoding="utf-8"))


def read(name: str, **options: Any) -> LatentPreference:
    """A published checkpoint, trainable."""
    return read_published_latent(LPO / name, LPO, **options)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest absolute value."""
    assert actual.shape == expected.shape
    difference = float((actual.detach() - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"largest difference {difference:.1e} of the largest value"
