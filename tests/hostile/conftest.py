"""Hypothesis draws subnormal numbers, which commands run in the same process may have had flushed to zero."""

import pytest
import torch


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    torch.set_flush_denormal(False)
