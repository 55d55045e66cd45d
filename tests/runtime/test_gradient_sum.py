"""The sums of two processes' gradients are started during the last backward pass, and are plain sums."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spo.errors import TrainingError
from spo.runtime import distributed
from spo.training.guards import FiniteGuard
from spo.training.updates import Updater
from tests.runtime.two import in_two_processes

BUCKET = 30  # numbers: a layer of the model below has 20


class Layers(nn.Module):
    """Four layers, applied in a given order; and weights of other layouts and uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.convolution = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.unused = nn.Parameter(torch.ones(7))
        self.of_process_1 = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """The loss () of x (n, 4)."""
        for number in order:
            x = torch.tanh(self.layers[number](x))
        if distributed.rank() == 1:
            x = x * self.of_process_1
        return x.square().sum() + self.convolution(x.reshape(-1, 2, 2, 1).repeat(1, 1, 1, 2)).sum()


ORDERS = {  # of the layers in each process's backward passes, of which the last one's sums start early
    "the same": ([[0, 1, 2, 3]], [[0, 1, 2, 3]]),
    "another": ([[0, 1, 2, 3]], [[2, 0, 3, 1]]),
    "more passes": ([[0, 1, 2], [0, 1], [0, 1, 2]], [[0, 1, 2]]),
    "a layer in the first pass alone": ([[0, 1, 2, 3], [0, 1]], [[0, 1, 2, 3], [0, 1]]),
    "no examples": ([[0, 1, 2, 3]], []),
    "none at all": ([], []),
}


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if each.grad is None else each.grad.clone() for each in model.parameters()]


def passes(orders: Sequence[Sequence[int]], *, dtype: torch.dtype | None) -> tuple[nn.Module, Tensor | None]:
    """A model with this process's gradients, summed if there is a dtype, and their norm then."""
    model = Layers()
    updater = None
    if dtype is not None:
        optimizer = torch.optim.SGD(model.parameters())
        updater = Updater(optimizer, FiniteGuard(1, "stop"), dtype=dtype, max_grad_norm=None)
    generator = torch.Generator().manual_seed(distributed.rank())
    for i, order in enumerate(orders, 1):
        loss = model(torch.randn(3, 4, generator=generator), order)
        if updater is None:
            loss.backward()
        else:
            updater.backward(loss, last=i == len(orders))
    return model, updater.clip_gradient() if updater else None


def plain_sum(model: nn.Module) -> list[Tensor | None]:
    """The sum of all processes' gradients, taken one after another."""
    found: list[Tensor | None] = []
    for each in zip(*distributed.gather_objects(gradients(model)), strict=True):
        present = [gradient for gradient in each if gradient is not None]
        found.append(sum(present[1:], start=present[0]) if present else None)
    return found


def started_before_the_first_layer() -> list[int]:
    """Of two backward passes, the second the last: sums started when it reaches the first layer, and in the end."""
    model, counts = Layers(), []
    updater = Updater(
        torch.optim.SGD(model.parameters()), FiniteGuard(1, "stop"), dtype=torch.float32, max_grad_norm=None
    )
    for last in (False, True):
        x = torch.ones(3, 4, requires_grad=True)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
            x.register_hook(lambda _, reduce=reduce: counts.append(reduce.call_count))
            first, *others = (0, 1, 2, 3)
            loss = model(torch.tanh(model.layers[first](x)), others)
            updater.backward(loss, last=last)
            if last:
                updater.gradient_sum.finish()
            counts.append(reduce.call_count)
    return counts


def overlapping_parts() -> str:
    """The error where a weight gets its gradient in two parts of the last backward pass."""
    weight = nn.Parameter(torch.ones(3))
    summed = distributed.GradientSum([weight])
    summed.expect_last_pass()
    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(lambda value: value * weight, x, use_reentrant=True)
    try:
        x.sum().backward()
    except TrainingError as error:
        summed.finish()
        return str(error)
    return ""


def work() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with mock.patch.object(distributed, "BUCKET", BUCKET):
        for name, orders in ORDERS.items():
            made[name] = {}
            for dtype in (torch.float32, torch.float16):
                torch.manual_seed(0)
                model, norm = passes(orders[distributed.rank()], dtype=dtype)
                torch.manual_seed(0)
                plain, _ = passes(orders[distributed.rank()], dtype=None)
                strides = [None if each.grad is None else each.grad.stride() for each in model.parameters()]
                expected = [each.stride() for each in model.parameters()]
                made[name][dtype] = (gradients(model), plain_sum(plain), norm, strides, expected)
        made["started"] = started_before_the_first_layer()
        made["error"] = overlapping_parts()
    return made


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return in_two_processes(work, folder=tmp_path_factory.mktemp("sums"))


@pytest.mark.parametrize("case", ORDERS)
def test_sums_are_those_of_the_gradients_one_after_another_to_the_bit(outcomes, case: str):
    for outcome in outcomes:
        found, expected, norm, *_ = outcome[case][torch.float32]
        assert [each is None for each in found] == [each is None for each in expected]
        present = [(ours, theirs) for ours, theirs in zip(found, expected, strict=True) if theirs is not None]
        assert all(torch.equal(ours, theirs) for ours, theirs in present)
        assert norm == pytest.approx(sum(float(theirs.square().sum()) for _, theirs in present) ** 0.5)
        assert len(present) == {"none at all": 0, "more passes": 9}.get(case, 11 if case != "no examples" else 10)


@pytest.mark.parametrize("case", ORDERS)
def test_the_factor_of_float16_changes_no_sum(outcomes, case: str):
    for outcome in outcomes:
        plain, scaled = (outcome[case][dtype][0] for dtype in (torch.float32, torch.float16))
        for ours, theirs in zip(plain, scaled, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_gradient_has_the_layout_of_its_weight(outcomes):
    for outcome in outcomes:
        *_, strides, expected = outcome["the same"][torch.float32]
        assert [each for each in strides if each] == [e for s, e in zip(strides, expected, strict=True) if s]


def test_sums_start_before_the_last_backward_pass_ends_and_in_no_earlier_pass(outcomes):
    for outcome in outcomes:
        in_first, of_first, in_last, of_last = outcome["started"]
        assert in_first == of_first == 0
        assert 3 <= in_last < of_last


def test_a_gradient_in_two_parts_of_the_last_pass_is_one_clear_error(outcomes):
    for outcome in outcomes:
        assert "use_reentrant=False" in outcome["error"]


def test_buckets_hold_every_parameter_once_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET", 10)
    sizes = [4, 6, 1, 25, 3, 3]
    tensors = [nn.Parameter(torch.zeros(size)) for size in sizes]
    tensors.append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    buckets = list(distributed._buckets(tensors))
    assert [[len(tensor) for tensor in bucket] for bucket in buckets] == [[4, 6], [1], [25], [3, 3], [2]]
    assert [id(tensor) for bucket in buckets for tensor in bucket] == [id(tensor) for tensor in tensors]


def test_one_process_sums_nothing_and_adds_no_hook() -> None:
    weight = nn.Parameter(torch.ones(2))
    summed = distributed.GradientSum([weight])
    summed.expect_last_pass()
    weight.sum().backward()
    gradient = weight.grad
    summed.finish()
    assert weight.grad is gradient
    assert not weight._post_accumulate_grad_hooks
