"""Rows that lie in several files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spo.runtime.shards import Sharded, Shards


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.lists(st.integers(0, 10**6), max_size=12))
def test_rows_in_several_tensors_are_those_of_one(sizes: list[int], rows: list[int]) -> None:
    whole = torch.arange(sum(sizes) * 6.0).view(-1, 2, 3)
    sharded = Sharded(whole.split(sizes))
    index = torch.tensor(rows, dtype=torch.long) % len(whole)
    assert sharded.shape == whole.shape
    assert torch.equal(sharded[index], whole[index])
    pairs = index[: len(index) // 2 * 2].view(-1, 2)
    assert torch.equal(sharded[pairs], whole[pairs])


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "a", 3)
    assert shards.missing() == [0, 1, 2]
    for number in (0, 2):
        shards.keep(number, {"x": torch.full((4,), float(number))})
    assert Shards(tmp_path / "a", 3).missing() == [1]
    with pytest.raises(OSError, match="000001"):
        shards.read()
    shards.keep(1, {"x": torch.ones(4)})
    shards.mark_checked()
    assert [file["x"][0].item() for file in shards.read()] == [0, 1, 2]
    file = tmp_path / "a" / "000002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert Shards(tmp_path / "a", 3).missing() == [2]
