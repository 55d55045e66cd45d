"""A network that two processes hold in parts trains as a whole one does, and its states and checkpoints are whole.

As in tests/runtime/test_distributed.py, steps are plain ones and each law allows for the rounding of sums.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spo.config import FLOW, OracleConfig, SafetyConfig, SamplerConfig, SpoConfig, WatchConfig
from spo.core.types import Pairs
from spo.methods.spo import Spo
from spo.models.flow import FlowNetwork
from spo.models.generate import generate
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.models.policy import load_policy
from spo.runtime import distributed
from spo.runtime.checkpoint import StateStore
from spo.runtime.sharding import local, whole
from spo.tracking import NullTracker
from spo.training.adamw import adamw
from spo.training.align import align
from spo.training.guards import FiniteGuard
from spo.training.updates import Updater
from spo.training.watch import Watch
from tests.models.tiny import draw_latents, make_tiny_denoiser, make_tiny_pipeline, shake
from tests.runtime.test_distributed import PROMPTS, SETTINGS, PickyScorer, assert_same_pairs
from tests.runtime.two import in_two_processes
from tests.training.steps import PlainSteps, assert_same_up_to_rounding, flat

CASES: dict[str, dict[str, Any]] = {
    "sd15": {"family": "sd15"},
    "sd15, whole": {"family": "sd15", "full": True},
    "sd3": {"family": "sd3"},
    "flux, checkpointing": {"family": "flux", "gradient_checkpointing": True},
}
RATE = {True: 0.01, False: 1.0}  # by whether the whole network trains


def make_policy(pipeline: Path, family: str, *, full: bool = False, sharded: bool = False, **model: Any):
    policy = make_tiny_denoiser(family, pipeline, **model)
    policy.network.batch_size = 3  # passes without gradients: their number differs between the processes
    if full:
        policy.network.unfreeze()
    else:
        add_lora(policy.network.module, SpoConfig(**SETTINGS).lora, seed=0)
        shake(policy, scale=0.05)
    if sharded:
        policy.network.shard()
    return policy


def watch_of(policy: LatentDiffusion) -> Watch:
    """Two pictures of the pipeline at the start and after each round."""
    kind: dict[str, Any] = {"scheduler": FLOW} if isinstance(policy.network, FlowNetwork) else {"eta": 0.0}
    sampler = SamplerConfig(**{"scheduler": "DDIMScheduler", "steps": 2, "guidance_scale": 5.0, **kind})

    def paint() -> Tensor:
        return generate(policy, PROMPTS[:2], [1, 2], sampler=sampler, batch_size=2)

    def brightness(images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    config = WatchConfig(every=1, num_prompts=2, metric=OracleConfig(), score="aesthetic")
    return Watch(config, paint, brightness, brightness)


def run(pipeline: Path, folder: Path, case: str, *, sharded: bool = False) -> dict[str, Any]:
    """Align once; all pairs, the metrics, each step's gradient, how far the weights moved, and the bytes held."""
    settings = CASES[case]
    policy = make_policy(pipeline, sharded=sharded, **settings)
    network, config = policy.network, SpoConfig(**SETTINGS)
    start = flat(map(whole, network.parameters())).clone()
    method = Spo(config, policy, PickyScorer(), PROMPTS, seed=0)
    rounds, collect = [], method.collect

    def recorded(epoch, *, skip=0):
        for round_ in collect(epoch, skip=skip):
            rounds.append(round_)
            yield round_

    method.collect = recorded
    optimizer = PlainSteps(network.parameters(), RATE[settings.get("full", False)])
    folder.mkdir()
    with (
        mock.patch("spo.training.align.adamw", return_value=optimizer),
        mock.patch("spo.training.align.rate_share", return_value=RATE[settings.get("full", False)]),
    ):
        metrics = align(method, policy, config, folder, NullTracker(), watch=watch_of(policy))
    modules = [network.module, *([network._frozen] if network._frozen else [])]
    weights = [parameter for module in modules for parameter in module.parameters()]
    return {
        "metrics": {name: value for name, value in metrics.items() if name != "seconds"},
        "pairs": Pairs.cat([round_.examples for round_ in rounds if round_.examples is not None]),
        "gradients": optimizer.gradients,
        "moved": flat(map(whole, network.parameters())) - start,
        "bytes": (sum(local(each).nbytes for each in weights), sum(each.nbytes for each in weights)),
    }


def resume(pipeline: Path, folder: Path) -> dict[str, Any]:
    """The weights after a run with AdamW, and after one that was stopped in its third round; the state between."""
    config = SpoConfig(**{**SETTINGS, "epochs": 2, "optimizer": {"learning_rate": 1e-3}})
    made: dict[str, Any] = {}
    for name, stops in {"alone": (None,), "stopped": (2, None)}.items():
        for stop in stops:
            policy = make_policy(pipeline, "sd15", sharded=True)
            method = Spo(config, policy, PickyScorer(), PROMPTS, seed=0)
            collect = method.collect

            def stopped(epoch, *, skip=0, stop=stop, collect=collect):
                if epoch * 2 + skip == stop:
                    raise KeyboardInterrupt
                yield from collect(epoch, skip=skip)

            method.collect = stopped
            store = StateStore(folder / f"{name}-states", {"case": "sharded"})
            out = folder / f"{name}-{distributed.rank()}"
            try:
                align(
                    method, policy, config, out, NullTracker(), store=store, safety=SafetyConfig(save_every_seconds=600)
                )
            except KeyboardInterrupt:
                distributed.wait()
                saved = store.load()
                made["state"] = (saved.number, {key: value.clone() for key, value in saved.tensors.items()})
                made["values"] = saved.values
        made[name] = flat(map(whole, policy.network.parameters()))
    return made


def held(pipeline: Path, case: str) -> tuple[float, float]:
    """Bytes of the gradients and of AdamW's moments that this process has after an update, by those of all weights."""
    policy = make_policy(pipeline, sharded=True, **CASES[case])
    parameters = policy.network.parameters()
    optimizer = adamw(parameters, weight_decay=0.0)
    updater = Updater(optimizer, FiniteGuard(1, "stop"), dtype=torch.float32, max_grad_norm=None)
    output = policy.predict(draw_latents(policy, 2), torch.tensor([801, 401]), policy.encode(["a", "b"]))
    updater.backward(output.square().mean(), last=True)
    norm = updater.clip_gradient().item()
    total = sum(each.nbytes for each in parameters)
    gradients = sum(local(each.grad).nbytes for each in parameters)
    updater.step(1.0, norm, learning_rate=1e-3)
    moments = sum(local(state[name]).nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return gradients / total, moments / total


def in_float16(pipeline: Path) -> dict[bool, Any]:
    """Norms, weights and the factor of three updates, of which the first one overflows in process 1 alone."""
    made = {}
    for sharded in (False, True):
        policy = make_policy(pipeline, "flux", sharded=sharded, dtype="float16")
        parameters = policy.network.parameters()
        updater = Updater(PlainSteps(parameters, 0.1), FiniteGuard(3, "stop"), dtype=torch.float16, max_grad_norm=None)
        norms = []
        for number in range(3):
            output = policy.predict(draw_latents(policy, 2), torch.tensor([801, 401]), policy.encode(["a", "b"]))
            factor = 1e12 if number == 0 and distributed.rank() == 1 else 1.0
            updater.backward(output.square().mean() * factor, last=True)
            norms.append(updater.clip_gradient().item())
            updater.step(1.0, norms[-1], learning_rate=0.1)
        made[sharded] = (norms, flat(map(whole, parameters)), updater.scaler.get_scale())
    return made


def work(pipelines: dict[str, Path], folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for case in CASES:
        pipeline, out = pipelines[CASES[case]["family"]], folder / f"{case}-{distributed.rank()}"
        made[case] = {**run(pipeline, out, case, sharded=True), "held": held(pipeline, case)}
    made["not sharded"] = run(pipelines["sd15"], folder / f"plain-{distributed.rank()}", "sd15")
    made["resumed"] = resume(pipelines["sd15"], folder)
    made["float16"] = in_float16(pipelines["flux"])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def pipelines(folder: Path) -> dict[str, Path]:
    return {family: make_tiny_pipeline(family, folder / f"model-{family}") for family in ("sd15", "sd3", "flux")}


@pytest.fixture(scope="module")
def both(folder: Path, pipelines: dict[str, Path]) -> list[dict[str, Any]]:
    """What each of two processes came to."""
    return in_two_processes(work, pipelines, folder, folder=folder)


@pytest.fixture(scope="module")
def alone(folder: Path, pipelines: dict[str, Path]) -> dict[str, Any]:
    """What one process comes to."""
    return {case: run(pipelines[CASES[case]["family"]], folder / f"{case}-alone", case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_come_to_the_pairs_gradients_and_weights_of_one(alone, both, case: str) -> None:
    ours = alone[case]
    assert ours["metrics"]["updates"] >= 2
    for theirs in (each[case] for each in both):
        assert_same_pairs(ours["pairs"], theirs["pairs"])
        for mine, other in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert_same_up_to_rounding(mine, other)
        assert_same_up_to_rounding(ours["moved"], theirs["moved"])
        assert torch.equal(theirs["moved"], both[0][case]["moved"])


def test_passes_that_only_keep_the_processes_together_count_nowhere(both) -> None:
    for each in both:
        assert each["sd15"]["metrics"] == pytest.approx(each["not sharded"]["metrics"])


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_half_of_the_weights_frozen_ones_included_and_of_gradients_and_moments(both, case) -> None:
    shares = [each[case]["bytes"][0] / each[case]["bytes"][1] for each in both]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)
    for each in both:
        assert each[case]["held"] == pytest.approx((0.5, 1.0), abs=0.1)


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_is_that_of_one_process(alone, both, folder: Path, pipelines, case: str) -> None:
    step = Path("checkpoints") / "step-000002"
    mine, theirs = (folder / f"{case}-{which}" / step for which in ("alone", "0"))
    names = sorted(str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file())
    for name in names:
        if name.endswith("config.json"):
            assert (mine / name).read_text() == (theirs / name).read_text()
        if name.endswith(".safetensors"):
            ours, others = load_file(mine / name), load_file(theirs / name)
            kinds = [{k: (v.shape, v.dtype) for k, v in each.items()} for each in (ours, others)]
            assert kinds[0] == kinds[1]
            assert_same_up_to_rounding(flat(ours[key].float() for key in ours), flat(others[k].float() for k in ours))
    policy = make_tiny_denoiser(CASES[case]["family"], pipelines[CASES[case]["family"]])
    load_policy(policy.network, theirs)


def test_a_stopped_run_ends_as_one_that_was_left_alone_to_the_bit(both) -> None:
    for each in both:
        assert torch.equal(each["resumed"]["alone"], each["resumed"]["stopped"])
        assert each["resumed"]["state"][0] == 2


def test_a_state_is_whole_so_a_network_that_is_not_sharded_continues_from_it(both, pipelines) -> None:
    (_, tensors), values = both[0]["resumed"]["state"], both[0]["resumed"]["values"]["updater"]
    parameters = make_policy(pipelines["sd15"], "sd15").network.parameters()
    updater = Updater(
        adamw(parameters, weight_decay=0.0), FiniteGuard(1, "stop"), dtype=torch.float32, max_grad_norm=None
    )
    updater.restore(tensors, values)
    again, numbers = updater.state()
    assert numbers == values
    assert {*again} == {*tensors}
    assert len([name for name in tensors if "exp_avg_sq" in name]) == len(parameters)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert all(each["resumed"]["state"][1].keys() == tensors.keys() for each in both)


def test_float16_has_one_factor_and_skips_an_update_that_overflows_in_one_process(both) -> None:
    for each in both:
        (norms, weights, scale), (sharded_norms, sharded, sharded_scale) = each["float16"].values()
        assert not torch.tensor(norms[0]).isfinite()
        assert not torch.tensor(sharded_norms[0]).isfinite()
        assert sharded_norms[1:] == pytest.approx(norms[1:], rel=1e-2)
        assert_same_up_to_rounding(weights, sharded)
        assert sharded_scale == scale == both[0]["float16"][False][2]


def test_one_process_keeps_the_network_whole(pipelines) -> None:
    network = make_policy(pipelines["sd15"], "sd15", sharded=True).network
    assert not network.is_sharded
    assert all(local(each) is each for each in network.module.parameters())
