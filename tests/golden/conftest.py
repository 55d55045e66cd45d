"""The published code's figures; README.md says how they came about."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="session")
def meta():
    return json.loads((GOLDEN / "meta.json").read_text(encoding="utf-8"))
