"""Float16 keeps small gradients, a power of two changes no digit, and bad updates are skipped."""

import math
from pathlib import Path

import pytest
import torch

from spo.config import LoraConfig, OptimizerConfig, SamplingConfig
from spo.errors import TrainingError
from spo.models.lora import add_lora
from spo.tracking import NullTracker
from spo.training import updates
from spo.training.align import align
from spo.training.guards import FiniteGuard
from spo.training.updates import Updater
from tests.methods.tiny import make_method
from tests.models.tiny import draw_latents, make_tiny_denoiser, make_tiny_pipeline, shake

T = torch.tensor([801, 401, 1])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline("sd15", tmp_path_factory.mktemp("sd15"))


def make_updater(parameters, dtype: torch.dtype, *, scale: float | None = None, **growth) -> Updater:
    """Updates by plain gradient descent; `scale`: the factor at the start."""
    optimizer = torch.optim.SGD(parameters)
    updater = Updater(optimizer, FiniteGuard(2, "lower the rate"), dtype=dtype, max_grad_norm=None)
    if scale is not None:
        updater.scaler = torch.amp.GradScaler("cpu", init_scale=scale, **growth)
    return updater


def gradients(denoiser, dtype: torch.dtype, factor: float) -> torch.Tensor:
    """The gradient of the mean square of a prediction times `factor`, flat."""
    updater = make_updater(denoiser.network.parameters(), dtype)
    updater.optimizer.zero_grad()
    loss = factor * denoiser.predict(draw_latents(denoiser, 3), T, denoiser.encode(["a", "b", "c"])).square().mean()
    updater.backward(loss)
    updater.clip_gradient()
    return torch.cat([parameter.grad.flatten() for parameter in updater.parameters])


def test_small_gradients_of_a_float16_model_are_those_of_float32_and_not_zero(pipeline):
    found = {}
    for dtype in ("float32", "float16"):
        denoiser = make_tiny_denoiser("sd15", pipeline, dtype=dtype)
        add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
        shake(denoiser, scale=0.1)
        found[dtype] = gradients(denoiser, getattr(torch, dtype), 1e-5)
        assert {parameter.dtype for parameter in denoiser.network.parameters()} == {torch.float32}
    lost = gradients(denoiser, torch.float32, 1e-5)
    assert (found["float16"] - found["float32"]).norm() < 0.05 * found["float32"].norm()
    assert (lost - found["float32"]).norm() > 0.5 * found["float32"].norm()


def make_weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_factor_changes_no_digit(dtype):
    weight = make_weight()
    (plain,) = torch.autograd.grad(weight.sin().sum(), weight)
    updater = make_updater([weight], dtype)
    updater.backward(weight.sin().sum())
    updater.clip_gradient()
    assert torch.equal(weight.grad, plain)
    assert updater.scaler.get_scale() == (2.0**16 if dtype == torch.float16 else 1.0)


def update(updater: Updater, loss: float = 1.0, factor: float = 1.0) -> bool:
    """One update with the gradient `factor`."""
    updater.backward(factor * updater.parameters[0].sum())
    return updater.step(loss, updater.clip_gradient().item(), learning_rate=0.1)


def test_the_factor_halves_at_an_overflow_and_doubles_after_enough_updates_without():
    updater = make_updater([make_weight()], torch.float16, scale=4.0, growth_interval=3)
    seen = []
    for factor in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0):
        seen.append((update(updater, factor=factor), updater.scaler.get_scale()))
    assert [made for made, _ in seen] == [True, True, False, True, True, True, True]
    assert [scale for _, scale in seen] == [4, 4, 2, 2, 2, 4, 4]
    assert updater.guard.skipped == 0  # an overflow is no failure


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_a_factor_of_1_an_overflow_is_a_bad_update(dtype):
    weight = make_weight()
    before = weight.detach().clone()
    updater = make_updater([weight], dtype, scale=1.0 if dtype == torch.float16 else None)
    assert not update(updater, factor=math.inf)
    with pytest.raises(TrainingError, match=r"2 updates in a row.*lower the rate"):
        update(updater, factor=math.nan)
    assert updater.guard.skipped == 2
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_that_is_not_finite_changes_nothing_and_the_next_update_is_made(dtype):
    weight = make_weight()
    before = weight.detach().clone()
    updater = make_updater([weight], dtype)
    assert not update(updater, loss=math.nan)
    assert updater.guard.skipped == 1
    assert torch.equal(weight, before)
    assert update(updater)
    torch.testing.assert_close(weight.detach(), before - 0.1)


def test_alignment_in_float16_trains_float32_weights_and_lowers_the_factor_where_it_must(
    pipeline, tmp_path, monkeypatch
):
    trained = {}
    scaler = updates.GradScaler
    for start in (2.0**16, 2.0**28):  # the second is about 2**6 too large
        monkeypatch.setattr(
            updates, "GradScaler", lambda device, enabled, start=start: scaler(device, init_scale=start)
        )
        sampling = SamplingConfig(steps=2, eta=1.0, guidance_scale=5.0)
        policy = make_tiny_denoiser("sd15", pipeline, dtype="float16", sampling=sampling)
        add_lora(policy.network.module, LoraConfig(rank=2), seed=0)
        before = [parameter.detach().clone() for parameter in policy.network.parameters()]
        method = make_method("spo", policy, epochs=5, checkpoints=1, optimizer=OptimizerConfig(learning_rate=1e-3))
        (tmp_path / str(start)).mkdir()
        trained[start] = align(method, policy, method.config, tmp_path / str(start), NullTracker())
        assert {parameter.dtype for parameter in policy.network.parameters()} == {torch.float32}
        assert all(parameter.isfinite().all() for parameter in policy.network.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, policy.network.parameters(), strict=True))
    assert 0 < trained[2.0**28]["updates"] < trained[2.0**16]["updates"]
    assert trained[2.0**28]["skipped"] == 0


def test_a_resumed_run_has_the_weights_the_optimizer_and_the_factor_of_before():
    saved, resumed = (make_updater([make_weight()], torch.float16, scale=4.0, growth_interval=3) for _ in range(2))
    saved.optimizer, resumed.optimizer = (torch.optim.AdamW(each.parameters) for each in (saved, resumed))
    for factor in (1.0, math.inf, 2.0):
        update(saved, factor=factor)
    tensors, values = saved.state()
    resumed.restore({name: tensor.clone() for name, tensor in tensors.items()}, values)
    assert resumed.scaler.state_dict() == saved.scaler.state_dict()
    for factor in (1.0, 3.0):
        update(saved, factor=factor)
        update(resumed, factor=factor)
    assert torch.equal(resumed.parameters[0], saved.parameters[0])
    assert resumed.scaler.get_scale() == saved.scaler.get_scale() == 4.0
