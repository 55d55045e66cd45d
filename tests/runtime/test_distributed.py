"""Two processes come to what one does; and where one of them fails, the other ends.

Their sums are rounded in another order, so each law allows for a rounding and for nothing else, on any processor. Steps
are therefore plain ones (tests/training/steps.py), and no ratio is clamped, for at the clamp a rounding decides whether
there is a gradient. Planted faults show that the laws notice a real difference.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from spo.config import (
    GrpoConfig,
    LatentPreferenceConfig,
    LoraConfig,
    OptimizerConfig,
    PixelPreferenceConfig,
    SpoConfig,
)
from spo.core.noise import KeyedNoise
from spo.core.types import LabelledPairs, Pairs, Steps
from spo.data.preferences import PairWriter, PreferencePair, PreferencePairs
from spo.methods.grpo import Grpo
from spo.methods.spo import Spo
from spo.models.lora import add_lora
from spo.preference.checkpoint import load_clip
from spo.preference.latent_checkpoint import LatentPreference
from spo.runtime import distributed
from spo.tracking import NullTracker
from spo.training.align import align
from spo.training.latent_preference import LatentPreferenceTraining
from spo.training.measure import Measured, measure
from spo.training.preference import StepAwareTraining
from spo.world.pretraining.clip import new_clip, new_tokenizer, save_clip
from tests.models.tiny import RESOLUTION, make_tiny_denoiser, make_tiny_pipeline, shake
from tests.runtime.two import end, start_two
from tests.training.steps import PlainSteps, assert_same_up_to_rounding, flat
from tests.training.test_preference import make_pairs

PROMPTS = ["a cat", "a dog", "a house", "a tree", "a boat"]
SETTINGS = {
    "epochs": 1,
    "prompts_per_rollout": 4,  # 2 and 2, then 1 and none
    "candidates": 2,
    "first_step": 2,
    "threshold": 0.0,
    "clip_range": None,
    "batch_size": 5,
    "micro_batch_size": 2,
    "checkpoints": 1,
    "lora": LoraConfig(rank=2),
    "optimizer": OptimizerConfig(learning_rate=1.0),
}


class PickyScorer:
    """Prefers bright images, but has no opinion on the first prompts of a batch: of those no pair is kept."""

    def encode(self, prompts):
        return torch.tensor([[float(prompt in PROMPTS[2:])] for prompt in prompts])

    def __call__(self, candidates):
        return 1e3 * candidates.images.mean(dim=(2, 3, 4)) * candidates.text[:, 0]


def run(pipeline: Path, folder: Path, *, family: str = "sd15") -> dict[str, Any]:
    """Align once; the pairs of all rounds, the metrics, the gradient of each step, and how far the weights moved."""
    policy = make_tiny_denoiser(family, pipeline)
    config = SpoConfig(**SETTINGS)
    add_lora(policy.network.module, config.lora, seed=0)
    shake(policy, scale=0.05)
    start = flat(policy.network.parameters()).clone()
    method = Spo(config, policy, PickyScorer(), PROMPTS, seed=0)
    rounds = []
    collect = method.collect

    def recorded(epoch, *, skip=0):
        for round_ in collect(epoch, skip=skip):
            rounds.append(round_)
            yield round_

    method.collect = recorded
    optimizer = PlainSteps(policy.network.parameters(), config.optimizer.learning_rate)
    folder.mkdir()
    with mock.patch("spo.training.align.adamw", return_value=optimizer):
        metrics = align(method, policy, config, folder, NullTracker())
    return {
        "metrics": {name: value for name, value in metrics.items() if name != "seconds"},
        "measured": [dict(round_.measured) for round_ in rounds],
        "pairs": Pairs.cat([round_.examples for round_ in rounds if round_.examples is not None]),
        "gradients": optimizer.gradients,
        "moved": flat(policy.network.parameters()) - start,
    }


def train_preference(pipeline: Path, clip: Path) -> dict[str, Any]:
    """Three steps of an odd batch; each one's measurements and gradient, and how far the weights moved."""
    config = PixelPreferenceConfig(start_from="-", steps=3, batch_size=3, learning_rate=0.1, warmup_steps=0)
    base = make_tiny_denoiser("sd15", pipeline)
    preference = load_clip(clip, generator=torch.Generator().manual_seed(0))
    training = StepAwareTraining(base, preference, config)
    training.updater.optimizer = optimizer = PlainSteps(preference.model.parameters(), config.learning_rate)
    pairs = replace(make_pairs(training, 8), weight=torch.arange(1.0, 9.0))
    start = flat(preference.model.parameters()).clone()
    rows = [training.step(pairs, step, seed=0) for step in range(config.steps)]
    moved = flat(preference.model.parameters()) - start
    return {"rows": rows, "gradients": optimizer.gradients, "moved": moved}


def train_latent(pipeline: Path) -> dict[str, Any]:
    """The same of a latent preference model."""
    config = LatentPreferenceConfig(steps=3, batch_size=3, learning_rate=0.1, warmup_steps=0, max_grad_norm=None)
    base = make_tiny_denoiser("sd15", pipeline)
    preference = LatentPreference.from_pipeline(base.network.pipeline, generator=torch.Generator().manual_seed(0))
    training = LatentPreferenceTraining(base, preference, config)
    training.updater.optimizer = optimizer = PlainSteps(preference.model.parameters(), config.learning_rate)
    latents = torch.randn(8, 2, *base.latent_shape, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    pairs = LabelledPairs.of(latents, label, torch.arange(1.0, 9.0), [f"prompt {i}" for i in range(8)])
    start = flat(preference.model.parameters()).clone()
    rows = [training.step(pairs, step, seed=0) for step in range(config.steps)]
    moved = flat(preference.model.parameters()) - start
    return {"rows": rows, "gradients": optimizer.gradients, "moved": moved}


def measure_pictures(pipeline: Path, file: Path, folder: Path) -> Measured:
    """The latents of ten pairs in files of three."""
    base = make_tiny_denoiser("sd15", pipeline)
    quantities = {folder: lambda: lambda images, _: base.autoencoder.encode(images)}
    with mock.patch("spo.training.measure.PAIRS_IN_A_FILE", 3):
        options: dict[str, Any] = {"sizes": [(RESOLUTION, RESOLUTION)], "device": base.device, "label": "encode"}
        return measure(PreferencePairs(file), torch.arange(10), quantities, **options)[folder]


def write_pairs(file: Path) -> None:
    """Ten pairs; one picture is in two of them."""
    with PairWriter(file) as writer:
        for number in range(10):
            images = []
            for level in (number % 9, 100 + number):
                data = BytesIO()
                Image.new("RGB", (20, 20), (level, 10, 200 - level)).save(data, "PNG")
                images.append(data.getvalue())
            writer.write(PreferencePair("a cat", *images, 1.0, 0.0))


def collect_steps(pipeline: Path) -> Steps:
    """The examples of an epoch of GRPO."""
    policy = make_tiny_denoiser("sd15", pipeline)
    method = Grpo(GrpoConfig(candidates=3, prompts_per_rollout=3), policy, PickyScorer(), PROMPTS)
    return Steps.cat([round_.examples for round_ in method.collect(0) if round_.examples is not None])


SHARE = distributed.share


class Averaged(distributed.GradientSum):
    def finish(self) -> None:
        super().finish()
        for parameter in chain.from_iterable(self._buckets):
            if parameter.grad is not None:
                parameter.grad /= 2


class KeptToOneself(distributed.GradientSum):
    def expect_last_pass(self) -> None:
        pass

    def finish(self) -> None:
        pass


class PartlyLost(distributed.GradientSum):
    def _start_next(self) -> None:
        for parameter in self._buckets[len(self._started)]:
            if parameter.grad is not None and distributed.rank() == 1:
                parameter.grad *= 0.98
        super()._start_next()


def drop_the_last(n: int) -> slice:
    mine = SHARE(n)
    return slice(mine.start, max(mine.start, mine.stop - distributed.rank()))


def key_by_place(seed: int, epoch: int, prompt_ids: list[int], device: torch.device) -> KeyedNoise:
    return KeyedNoise(seed, epoch, list(range(len(prompt_ids))), device)


SUM = "spo.runtime.distributed.GradientSum"
FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "gradients are averaged": (SUM, Averaged),
    "gradients are not summed": (SUM, KeptToOneself),
    "a fiftieth of one gradient is lost": (SUM, PartlyLost),
    "a process drops the last of its share": ("spo.runtime.distributed.share", drop_the_last),
    "noise is keyed to a prompt's place in its process": ("spo.methods.sampled.KeyedNoise", key_by_place),
}
OF_GRADIENTS = [fault for fault, (target, _) in FAULTS.items() if target == SUM]
OF_PAIRS = [fault for fault in FAULTS if fault not in OF_GRADIENTS]


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    if fault is None:
        yield
    else:
        with mock.patch(*FAULTS[fault]):
            yield


def process(out: Path, pipeline: Path, flow: Path, clip: Path, pairs: Path) -> None:
    """One of two processes: aligns, with each fault, too; then process 1 fails while process 0 waits for it."""
    made: dict[str | None, Any] = {}
    for number, fault in enumerate((None, *FAULTS)):
        with planted(fault):
            made[fault] = {"align": run(pipeline, out.with_suffix(f".{number}"))}
            if fault is None or fault in OF_GRADIENTS:
                made[fault]["preference"] = train_preference(pipeline, clip)
    made[None] |= {"latent": train_latent(pipeline), "grpo": collect_steps(pipeline)}
    made[None] |= {"flow": run(flow, out.with_suffix(".flow"), family="sd3")}
    measured = measure_pictures(pipeline, pairs, pairs.with_name("of-two"))
    made[None] |= {"measured": (measured.of_pairs(), measured.members)}
    torch.save(made, out)
    if distributed.rank() == 1:
        sys.exit(3)
    try:
        distributed.gather(torch.zeros(1))
    except RuntimeError:
        sys.exit(4)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory):
    """What one process comes to, and each of two, without a fault and with each; and the two's exit codes."""
    folder = tmp_path_factory.mktemp("distributed")
    pipeline, clip = make_tiny_pipeline("sd15", folder / "model"), folder / "clip"
    flow = make_tiny_pipeline("sd3", folder / "flow")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_clip(new_clip(tokenizer := new_tokenizer()), tokenizer, clip)
    pairs = folder / "pairs.parquet"
    write_pairs(pairs)
    processes, files = start_two(process, pipeline, flow, clip, pairs, folder=folder)
    alone = {"align": run(pipeline, folder / "alone"), "preference": train_preference(pipeline, clip)}
    alone |= {"latent": train_latent(pipeline), "grpo": collect_steps(pipeline)}
    alone |= {"flow": run(flow, folder / "alone-flow", family="sd3")}
    measured = measure_pictures(pipeline, pairs, folder / "of-one")
    alone |= {"measured": (measured.of_pairs(), measured.members)}
    codes = end(processes)
    return alone, [torch.load(file, weights_only=False) for file in files], codes


@pytest.fixture(scope="module")
def aligned(outcomes):
    alone, both, _ = outcomes
    return alone["align"], [other[None]["align"] for other in both]


def assert_same_pairs(ours: Pairs, theirs: Pairs) -> None:
    """In number, in order, and in what they are."""
    assert torch.equal(theirs.t, ours.t)
    for name in ("x_t", "x_prev", "margin"):
        assert_same_up_to_rounding(getattr(ours, name), getattr(theirs, name))


def assert_same_steps(ours: dict[str, Any], *others: dict[str, Any]) -> None:
    """Each step's gradient and all that the weights moved; and of several processes, to the bit."""
    for other in others:
        for mine, theirs in zip(ours["gradients"], other["gradients"], strict=True):
            assert_same_up_to_rounding(mine, theirs)
        assert_same_up_to_rounding(ours["moved"], other["moved"])
        assert torch.equal(other["moved"], others[0]["moved"])


@pytest.mark.parametrize("stage", ["align", "flow"])
def test_two_processes_collect_the_pairs_of_one_in_its_order(outcomes, stage: str):
    alone, both, _ = outcomes
    for other in both:
        assert_same_pairs(alone[stage]["pairs"], other[None][stage]["pairs"])


@pytest.mark.parametrize("stage", ["align", "flow"])
def test_two_processes_come_to_the_adapter_of_one(outcomes, stage: str):
    alone, both, _ = outcomes
    assert alone[stage]["metrics"]["updates"] >= 2
    assert_same_steps(alone[stage], *(other[None][stage] for other in both))


@pytest.mark.parametrize("kind", ["preference", "latent"])
def test_two_processes_train_the_preference_model_of_one(outcomes, kind: str):
    alone, both, _ = outcomes
    both = [other[None][kind] for other in both]
    assert_same_steps(alone[kind], *both)
    for ours, theirs in zip(alone[kind]["rows"], both[0]["rows"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-6)


def test_two_processes_measure_the_pictures_of_one_and_share_their_files(outcomes):
    alone, both, _ = outcomes
    for other in both:
        assert_same_up_to_rounding(alone["measured"][0], other[None]["measured"][0])
        assert torch.equal(alone["measured"][1], other[None]["measured"][1])


def test_two_processes_collect_the_steps_of_one_in_its_order(outcomes):
    alone, both, _ = outcomes
    for other in (each[None]["grpo"] for each in both):
        assert torch.equal(other.t, alone["grpo"].t)
        for name in ("x_t", "x_prev", "log_p", "advantage"):
            assert_same_up_to_rounding(getattr(alone["grpo"], name), getattr(other, name))


@pytest.mark.parametrize("fault", OF_GRADIENTS)
@pytest.mark.parametrize("stage", ["align", "preference"])
def test_two_processes_whose_gradients_differ_from_those_of_one_are_caught(outcomes, stage: str, fault: str):
    alone, both, _ = outcomes
    with pytest.raises(AssertionError):
        assert_same_steps(alone[stage], *(other[fault][stage] for other in both))


@pytest.mark.parametrize("fault", OF_PAIRS)
def test_two_processes_whose_pairs_differ_from_those_of_one_are_caught(outcomes, fault: str):
    alone, both, _ = outcomes
    for other in both:
        with pytest.raises(AssertionError):
            assert_same_pairs(alone["align"]["pairs"], other[fault]["align"]["pairs"])


def test_what_is_recorded_is_of_all_processes(aligned):
    alone, both = aligned
    for other in both:
        assert {**other["metrics"], "unet_forwards": 0, "vae_decodes": 0, "kept_share": 0} == {
            **alone["metrics"],
            "unet_forwards": 0,
            "vae_decodes": 0,
            "kept_share": 0,
        }
        assert other["metrics"]["kept_share"] == alone["metrics"]["kept_share"]
        assert other["metrics"]["unet_forwards"] > alone["metrics"]["unet_forwards"]  # an idle process samples, too
        for ours, theirs in zip(alone["measured"], other["measured"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-3)


def test_a_process_that_fails_does_not_leave_the_other_waiting(outcomes):
    *_, codes = outcomes
    assert codes == [4, 3]


def test_shares_follow_one_another_and_differ_by_one_at_most(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 3)
    for n in (0, 1, 2, 3, 7):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(list(range(n))[distributed.share(n)])
        assert [row for part in parts for row in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
