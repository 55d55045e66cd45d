"""Find out in a minute what would else end a run after hours.

First what can be seen without a model: the settings, files, models and disk. Then all stages run in miniature, in a
temporary folder, over the profile's own models and data: a few prompts and pairs, one rollout, one step or update, of
as many pairs at a time as in training. What that takes tells what the whole will take.
"""

import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from spo.commands.disk_estimate import num_pairs
from spo.commands.preflight import Finding, findings
from spo.config import Config, DiffusionDpoConfig, MethodConfig, SampledConfig
from spo.data.preferences import PairWriter, read_pairs
from spo.data.prompts import read_prompts
from spo.errors import DataError, SpoError
from spo.models.schedulers import build_scheduler
from spo.runtime.files import read_json
from spo.stages import align, evaluate, prepare, report, train_preference
from spo.tracking import NullTracker

PROMPTS, SAMPLED, PAIRS_READ, PAIRS = 30, 2, 256, 64
GIB = 2**30


def check(config: Config, root: Path, say: Callable[[Finding], None], *, quick: bool = False) -> bool:
    """Say what is found as it is found; whether all of it is good. `quick` leaves the miniature out."""
    found = findings(config, root)
    for finding in found:
        say(finding)
    if quick or not all(finding.good for finding in found):
        return all(finding.good for finding in found)
    with tempfile.TemporaryDirectory(prefix="spo-check-") as folder:
        return _run_miniature(config, root, Path(folder), say)


def _run_miniature(config: Config, root: Path, folder: Path, say: Callable[[Finding], None]) -> bool:
    small = miniature(config, root)
    tracker = NullTracker()
    seed = config.training_seeds[0]
    stages: list[tuple[str, Callable[[], object]]] = [
        ("prepare", lambda: _prepare(small, config, folder)),
        ("train_preference", lambda: train_preference.run(small, root=folder, tracker=tracker)),
        *[
            (f"align {name}", lambda name=name: align.run(small, name, seed, root=folder, tracker=tracker))
            for name in config.methods
        ],
        ("evaluate", lambda: evaluate.run(small, root=folder, tracker=tracker)),
        ("report", lambda: report.run(small, root=folder, tracker=tracker)),
    ]
    taken = {}
    for stage, run in stages:
        start = time.perf_counter()
        try:
            taken[stage] = _taken(run)
            if stage == "prepare":
                _shorten(folder / small.folder("prepare") / "preferences")
        except SpoError as error:
            say(Finding(f"{stage} in miniature", False, str(error), ()))
            return False
        say(Finding(f"{stage} in miniature", True, f"{time.perf_counter() - start:.1f} s", ()))
    say(Finding("time", True, _time(config, root, folder), ()))
    say(Finding("memory", True, _memory(taken), ()))
    return True


def _prepare(small: Config, config: Config, folder: Path) -> None:
    """Read a few pairs, or all where those leave a side without any, as in a file that is sorted by caption."""
    try:
        prepare.run(small, root=folder, tracker=NullTracker())
    except DataError:
        few, wanted = small.prepare.preferences, config.prepare.preferences
        if few is None or wanted is None:
            raise
        section = small.prepare.model_copy(
            update={"preferences": few.model_copy(update={"max_pairs": wanted.max_pairs})}
        )
        prepare.run(small.model_copy(update={"prepare": section}), root=folder, tracker=NullTracker())


def miniature(config: Config, root: Path) -> Config:
    """The profile with its own models, data and samplers, but next to nothing to do."""
    values = config.model_dump()
    values["training_seeds"] = config.training_seeds[:1]
    values["prepare"]["prompts"] |= {"source": str((root / config.prepare.prompts.source).resolve())}
    values["prepare"]["prompts"] |= {"max_prompts": PROMPTS}
    values["prepare"] |= {"validation_fraction": 0.3, "test_fraction": 0.2}
    if preferences := config.prepare.preferences:
        source = preferences.source
        if not source.startswith("hub:"):
            source = str((root / source).resolve())
        values["prepare"]["preferences"] |= {"source": source, "max_pairs": PAIRS_READ}
    values["train_preference"] |= {"steps": 1, "evaluate_pairs": 2}
    values["train_preference"] |= {"batch_size": min(config.train_preference.batch_size, PAIRS)}
    values["train_preference"]["evaluate_timesteps"] = config.train_preference.evaluate_timesteps[:1]
    values["align"] = {name: _one_update(method) for name, method in config.align.items()}
    values["evaluate"] |= {"num_prompts": 2, "num_validation_prompts": 2, "images_per_prompt": 1}
    values["evaluate"] |= {"batch_size": 1, "bootstrap_samples": 100}
    return Config.model_validate(values)


def _one_update(method: MethodConfig) -> dict[str, Any]:
    """Settings under which a method collects once and updates on as many pairs as are in memory at a time."""
    at_a_time = min(method.micro_batch_size or method.batch_size, PAIRS)
    small: dict[str, Any] = {"epochs": 1, "batch_size": at_a_time, "micro_batch_size": None, "checkpoints": 1}
    if isinstance(method, SampledConfig):
        small |= {"rollouts_per_epoch": 1, "prompts_per_rollout": SAMPLED, "threshold": 0.0}
    if isinstance(method, DiffusionDpoConfig):
        small |= {"updates_per_epoch": 1}
    if method.watch:
        small["watch"] = method.watch.model_dump() | {"num_prompts": 2}
    return {**method.model_dump(), **small}


def _shorten(folder: Path) -> None:
    """Leave as many pairs as a batch has, decided ones first: there must be some."""
    for path in folder.glob("*.parquet"):
        pairs = sorted(read_pairs(path), key=lambda pair: pair.is_tie)[:PAIRS]
        shorter = path.with_suffix(".short")
        with PairWriter(shorter) as writer:
            for pair in pairs:
                writer.write(pair)
        shutil.move(shorter, path)


def _time(config: Config, root: Path, folder: Path) -> str:
    parts = {stage: count for stage, count in forwards(config, root, folder).items() if count}
    rate = _seconds_a_forward(config, folder)
    return "at most about: " + ", ".join(f"{stage} {_duration(count * rate)}" for stage, count in parts.items())


def _taken(stage: Callable[[], object]) -> int:
    """Run a stage; the most bytes that tensors took on the GPU, or the process so far where there is none."""
    if not torch.cuda.is_available():
        stage()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch.cuda.reset_peak_memory_stats()
    stage()
    return torch.cuda.max_memory_allocated()


def _memory(taken: dict[str, int]) -> str:
    stage = max(taken, key=taken.__getitem__)  # of equals the first
    if torch.cuda.is_available():
        there, whose = torch.cuda.get_device_properties(0).total_memory, "the GPU's"
    else:
        there, whose = psutil.virtual_memory().total, "this machine's"
    how = f"with as many pairs at a time as in training (at most {PAIRS}), but rollouts of {SAMPLED} prompts"
    return f"{stage} took {taken[stage] / GIB:.1f} of {whose} {there / GIB:.1f} GiB, {how}"


def forwards(config: Config, root: Path, folder: Path) -> dict[str, float]:
    """Samples that the whole of each stage puts through the UNet; of `align` what the miniature did, scaled up."""
    prompts = config.prepare.prompts
    read, _ = read_prompts(root / prompts.source, field=prompts.field, max_prompts=prompts.max_prompts)
    num_prompts = len(read) * (1 - config.prepare.validation_fraction - config.prepare.test_fraction)
    training, seeds = config.train_preference, len(config.training_seeds)
    counts = {"train_preference": 0.0 if training.checkpoint else 4.0 * training.steps * training.batch_size}
    for name in config.methods:
        method = config.align[name]
        if isinstance(method, SampledConfig):
            most = (method.rollouts_per_epoch or num_prompts) * method.prompts_per_rollout
            sampled = method.epochs * min(num_prompts, most)
            counts[f"align {name}"] = seeds * sampled * _cost(config, folder, name)["unet_forwards"] / SAMPLED
        if isinstance(method, DiffusionDpoConfig):
            pairs = num_pairs(config, root)
            if method.updates_per_epoch:
                pairs = min(pairs or math.inf, method.updates_per_epoch * method.batch_size)
            counts[f"align {name}"] = 4.0 * seeds * method.epochs * (pairs or 0)  # two images, policy and reference
    evaluate = config.evaluate
    columns = 1 + len(config.methods) * seeds + len(evaluate.loras)
    checkpoints = sum(config.align[name].checkpoints * seeds for name in config.methods)
    test, validation = evaluate.num_prompts * evaluate.images_per_prompt * columns, evaluate.num_validation_prompts
    steps = {name: len(build_scheduler(sampler).timesteps) for name, sampler in evaluate.samplers.items()}
    sampled = test * sum(steps.values()) + validation * (1 + checkpoints) * steps[evaluate.deciding]
    return {**counts, "evaluate": 2.0 * sampled}


def _seconds_a_forward(config: Config, folder: Path) -> float:
    """Of the slowest method; the work around the UNet counts with it."""
    costs = [_cost(config, folder, name) for name in config.methods]
    return max(cost["seconds"] / max(1, cost["unet_forwards"]) for cost in costs)


def _cost(config: Config, folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / config.aligned(name, config.training_seeds[0]) / "metrics.json")


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h"
