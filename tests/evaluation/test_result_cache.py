"""What an evaluation keeps: whole and of the same inputs, or made anew."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spo.config import AestheticConfig
from spo.evaluation.image_scorer import files_of
from spo.evaluation.result_cache import ResultCache


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_an_entry_of_which_a_bit_has_changed_is_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    made: list[int] = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"scores": torch.arange(3.0), "images": torch.zeros(2, 3, dtype=torch.uint8)}

    cache = ResultCache(tmp_path)
    first = cache.get("key", make)
    again = cache.get("key", make)
    assert list(first) == list(again) == ["scores", "images"]
    assert len(made) == 1
    [file] = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(cache.get("key", make)["scores"], torch.arange(3.0))
    assert len(made) == 2
    cache.get("key", make)
    assert len(made) == 2


def test_a_metrics_file_that_was_replaced_under_its_name_has_another_digest(tmp_path: Path) -> None:
    head = tmp_path / "head.pth"
    metric = AestheticConfig(head=str(head))
    head.write_bytes(b"one")
    before = files_of([metric])
    assert files_of([metric]) == before
    head.write_bytes(b"two")
    assert files_of([metric]) != before
