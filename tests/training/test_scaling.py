"""What float16 would lose is kept, and what fits is not changed in a digit."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spo.config import LoraConfig, OptimizerConfig
from spo.models.lora import add_lora
from spo.tracking import NullTracker
from spo.training.align import align
from spo.training.guards import FiniteGuard
from spo.training.scaling import LossScale
from spo.training.state import State
from tests.methods.tiny import make_method
from tests.models.tiny import draw_latents, make_tiny_denoiser, make_tiny_pipeline, shake

T = torch.tensor([801, 401, 1])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline("sd15", tmp_path_factory.mktemp("sd15"))


def gradients(denoiser, scale: LossScale, factor: float) -> torch.Tensor:
    """Of the mean square of a prediction times `factor`, over all that trains, in one row."""
    for parameter in denoiser.network.parameters():
        parameter.grad = None
    loss = factor * denoiser.predict(draw_latents(denoiser, 3), T, denoiser.encode(["a", "b", "c"])).square().mean()
    scale.scale(loss).backward()
    scale.unscale(denoiser.network.parameters())
    return torch.cat([parameter.grad.flatten() for parameter in denoiser.network.parameters()])


def test_small_gradients_of_a_float16_model_are_those_of_float32_and_not_nothing(pipeline):
    found = {}
    for dtype in ("float32", "float16"):
        denoiser = make_tiny_denoiser("sd15", pipeline, dtype=dtype)
        add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
        shake(denoiser, scale=0.1)
        found[dtype] = gradients(denoiser, LossScale.of(getattr(torch, dtype)), 1e-5)
        assert {parameter.dtype for parameter in denoiser.network.parameters()} == {torch.float32}
    lost = gradients(denoiser, LossScale(1.0), 1e-5)
    assert (found["float16"] - found["float32"]).norm() < 0.05 * found["float32"].norm()
    assert (lost - found["float32"]).norm() > 0.5 * found["float32"].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_left_alone(dtype):
    scale, weight = LossScale.of(dtype), torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), 3.0)
    loss = torch.ones(())
    scale.unscale([weight])
    assert torch.equal(scale.scale(loss), loss)
    assert weight.grad == 3
    assert not scale.overflowed(finite=False)
    assert not scale.overflowed(finite=True)
    assert scale == LossScale(1.0)


def test_a_power_of_two_changes_no_digit():
    weight = torch.nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    scale = LossScale(2.0**16)
    (plain,) = torch.autograd.grad(weight.sin().sum(), weight)
    scale.scale(weight.sin().sum()).backward()
    scale.unscale([weight])
    assert torch.equal(weight.grad, plain)


def test_the_factor_halves_at_an_overflow_and_doubles_after_enough_updates_without():
    scale = LossScale(4.0, growth_interval=3)
    seen = []
    for finite in (True, True, False, True, True, True, True):
        seen.append((scale.overflowed(finite), scale.value))
    assert [overflowed for overflowed, _ in seen] == [False, False, True, False, False, False, False]
    assert [value for _, value in seen] == [4, 4, 2, 2, 2, 4, 4]


def test_at_one_an_overflow_is_no_matter_of_scale():
    scale = LossScale(2.0)
    assert scale.overflowed(finite=False)
    assert not scale.overflowed(finite=False)
    assert scale.value == 1


def test_alignment_in_float16_trains_float32_weights_and_lowers_the_factor_where_it_must(
    pipeline, tmp_path, monkeypatch
):
    trained = {}
    for start in (2.0**16, 2.0**40):
        monkeypatch.setattr(LossScale, "of", lambda dtype, start=start: LossScale(start))
        policy = make_tiny_denoiser("sd15", pipeline, dtype="float16")
        add_lora(policy.network.module, LoraConfig(rank=2), seed=0)
        before = [parameter.detach().clone() for parameter in policy.network.parameters()]
        method = make_method("spo", policy, epochs=8, checkpoints=1, optimizer=OptimizerConfig(learning_rate=1e-3))
        (tmp_path / str(start)).mkdir()
        trained[start] = align(method, policy, method.config, tmp_path / str(start), NullTracker())
        assert {parameter.dtype for parameter in policy.network.parameters()} == {torch.float32}
        assert all(parameter.isfinite().all() for parameter in policy.network.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, policy.network.parameters(), strict=True))
    assert 0 < trained[2.0**40]["updates"] < trained[2.0**16]["updates"]
    assert trained[2.0**40]["skipped"] == 0  # an overflow is no failure


def test_a_resumed_run_has_the_factor_of_before():
    def state(scale: LossScale) -> tuple[State, SimpleNamespace]:
        weight = torch.nn.Parameter(torch.ones(2))
        policy = SimpleNamespace(network=SimpleNamespace(parameters=lambda: [weight]))
        return State(torch.optim.AdamW([weight]), FiniteGuard(1), scale), policy

    (saved, policy), (other, other_policy) = state(LossScale(2.0**9, finite_updates=7)), state(LossScale(2.0**16))
    other.restore(other_policy, saved.snapshot(policy))
    assert asdict(other.scale) == asdict(saved.scale)
