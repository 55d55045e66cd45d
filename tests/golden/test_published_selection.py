import pytest
import torch

from spo.core.selection import select_pairs


@pytest.mark.parametrize("case", range(4))
def test_selected_candidates_are_the_published_ones(golden, meta, case):
    selection = select_pairs(golden[f"select{case}.scores"], threshold=meta["select"][case]["threshold"])
    assert torch.equal(torch.stack([selection.win, selection.lose]), golden[f"select{case}.indices"])
    assert torch.equal(selection.keep, golden[f"select{case}.valid"].bool())
