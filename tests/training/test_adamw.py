"""AdamW with moments of 8 bits, which needs bitsandbytes (`pip install -e .[gpu]`; it also computes on a CPU)."""

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from spo.errors import ConfigError
from spo.runtime.checkpoint import State, StateStore
from spo.training.adamw import adamw
from spo.training.guards import FiniteGuard
from spo.training.updates import Updater

SHAPES = ((80, 80), (3,), (64, 100))  # two are large enough for 8 bits, and so share bitsandbytes' tables
FINAL = 6


def updater_of(weights: list[nn.Parameter], *, eight_bit: bool = True) -> Updater:
    optimizer = adamw(weights, weight_decay=0.1, eight_bit=eight_bit)
    return Updater(optimizer, FiniteGuard(2, "lower the rate"), dtype=torch.float32, max_grad_norm=None)


def new_weights() -> list[nn.Parameter]:
    generator = Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(updater: Updater, first: int, end: int) -> Tensor:
    """Take steps first..end - 1, each along its own gradient; the weights after them."""
    for step in range(first, end):
        generator = Generator().manual_seed(step)
        for weight in updater.parameters:
            weight.grad = torch.randn(weight.shape, generator=generator)
        assert updater.step(1.0, 1.0, learning_rate=1e-2)
    return torch.cat([weight.detach().flatten() for weight in updater.parameters])


def test_without_bitsandbytes_eight_bits_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"eight_bit=true needs bitsandbytes; `pip install"):
        adamw(new_weights(), weight_decay=0.1, eight_bit=True)


def test_a_state_of_eight_bits_is_saved_and_resumed_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = steps(updater_of(new_weights()), 0, FINAL)
    begun, store = updater_of(new_weights()), StateStore(tmp_path / "state", {})
    steps(begun, 0, FINAL // 2)
    tensors, values = begun.state()
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("state1")} == {torch.uint8, torch.float32}
    store.save(State(FINAL // 2, tensors, values))
    saved = store.load()
    assert saved is not None
    resumed = updater_of(new_weights())
    resumed.restore(saved.tensors, saved.values)
    assert torch.equal(steps(resumed, FINAL // 2, FINAL), whole)


def test_steps_of_eight_bits_are_nearly_adams() -> None:
    pytest.importorskip("bitsandbytes")
    start = torch.cat([weight.detach().flatten() for weight in new_weights()])
    exact, rounded = (steps(updater_of(new_weights(), eight_bit=each), 0, FINAL) - start for each in (False, True))
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
