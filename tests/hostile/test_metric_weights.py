"""Whatever the file of a metric's weights holds, reading it gives a head or one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spo.errors import ModelError
from spo.metrics.weights import linear_head, read_tensors
from tests.hostile.test_checkpoints import ENTRIES, saved
from tests.hostile.trying import assert_one_line, damaged, tries


def head() -> dict[str, Tensor]:
    sizes = {0: (8, 4), 2: (4, 1)}
    layers = {number: nn.Linear(*size) for number, size in sizes.items()}
    return {
        f"layers.{i}.{name}": value.detach() for i, layer in layers.items() for name, value in layer.named_parameters()
    }


def assert_reads_or_explains(folder: Path, data: bytes) -> bool:
    path = folder / "head.pth"
    path.write_bytes(data)
    try:
        read = linear_head(read_tensors(path), "layers.", path)
    except ModelError as error:
        assert_one_line(error)
        return False
    assert read(torch.zeros(2, read[0].in_features)).isfinite().all()
    return True


@tries(80)
@given(data=st.data())
def test_a_damaged_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    torch.manual_seed(0)
    assert_reads_or_explains(tmp_path_factory.getbasetemp(), data.draw(damaged(st.just(saved(head())))))


@tries(80)
@given(name=st.sampled_from([*sorted(head()), "layers.x.weight", "\n", 3]), entry=ENTRIES, drop=st.booleans())
def test_an_entry_that_is_missing_extra_or_another(
    tmp_path_factory: pytest.TempPathFactory, name: Any, entry: Any, drop: bool
) -> None:
    state: dict[Any, Any] = head()
    if drop:
        state.pop(name, None)
    else:
        state[name] = entry
    assert_reads_or_explains(tmp_path_factory.getbasetemp(), saved(state))


@pytest.mark.parametrize("state", [[torch.ones(2)], torch.ones(2), {}, {"state_dict": 3}, {0: torch.ones(2)}, None])
def test_a_file_of_another_kind(tmp_path: Path, state: Any) -> None:
    assert not assert_reads_or_explains(tmp_path, saved(state))
