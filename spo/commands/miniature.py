"""Find in a minute what would end a run after hours.

First come the checks without a model. Then all stages run in miniature, in a temporary folder, with the profile's own
models and data: a few prompts and pairs, one rollout, one step or update, with as many pairs at a time as in training.
The time of the whole run is estimated from it.
"""

import importlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from spo.commands.disk_estimate import num_pairs
from spo.commands.preflight import Finding, show_findings
from spo.config import Config
from spo.data.preferences import PairWriter, read_pairs
from spo.data.prompts import read_prompts
from spo.errors import DataError, SpoError
from spo.models.schedulers import build_scheduler
from spo.pipeline import PIPELINE, STAGES
from spo.runtime.files import read_json
from spo.runtime.text import duration
from spo.stages import prepare
from spo.tracking import NullTracker
from spo.workspace import Prepared, Workspace

PROMPTS, SAMPLED, PAIRS_READ, PAIRS = 30, 2, 256, 64
GIB = 2**30


def check_all(config: Config, root: Path, show: Callable[[Finding], None]) -> bool:
    """Pass each finding to `show`; returns whether all are good."""
    if not show_findings(config, root, show):
        return False
    with tempfile.TemporaryDirectory(prefix="spo-check-") as folder:
        return _run_miniature(config, root, Path(folder), show)


def _run_miniature(config: Config, root: Path, folder: Path, show: Callable[[Finding], None]) -> bool:
    small = miniature(config, root)
    tracker = NullTracker()
    seed = config.training_seeds[0]
    memory = {}
    jobs: list[tuple[Any, ...]] = []
    for name in PIPELINE:
        items: dict[str, list[tuple[Any, ...]]] = {
            "method": [(method, seed) for method in config.methods],
            "preference_model": [(model,) for model in config.train_preference],
        }
        jobs += [(name, *item) for item in items.get(STAGES[name].item, [()])]
    for name, *job in jobs:
        stage = " ".join([name, *job[:1]])
        module = importlib.import_module(f"spo.stages.{name}")
        run = partial(module.run, small, *job, root=folder, tracker=tracker)
        start = time.perf_counter()
        try:
            memory[stage] = _peak_memory(partial(_prepare, small, config, folder) if stage == "prepare" else run)
            if stage == "prepare":
                _shorten(Workspace(small, folder).prepared)
        except SpoError as error:
            show(Finding(f"{stage} in miniature", False, str(error)))
            return False
        show(Finding(f"{stage} in miniature", True, f"{time.perf_counter() - start:.1f} s"))
    show(Finding("time", True, _time(config, root, folder)))
    show(Finding("memory", True, _memory(memory)))
    return True


def _prepare(small: Config, config: Config, folder: Path) -> None:
    """Read a few pairs, or all if a side would get none, as with a file sorted by caption."""
    try:
        prepare.run(small, root=folder, tracker=NullTracker())
    except DataError:
        few, all_pairs = small.prepare.preferences, config.prepare.preferences
        if few is None or all_pairs is None:
            raise
        section = {"preferences": few.model_copy(update={"max_pairs": all_pairs.max_pairs})}
        larger = small.model_copy(update={"prepare": small.prepare.model_copy(update=section)})
        prepare.run(larger, root=folder, tracker=NullTracker())


def miniature(config: Config, root: Path) -> Config:
    """The profile with its models, data and samplers, but with little work."""
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
    values["preference_models"] = {
        name: model.model_dump() | model.miniature(examples=PAIRS) for name, model in config.preference_models.items()
    }
    values["align"] = {
        name: method.model_dump() | method.miniature(examples=PAIRS, prompts=SAMPLED)
        for name, method in config.align.items()
    }
    values["evaluate"] |= {"num_prompts": 2, "num_validation_prompts": 2, "images_per_prompt": 1}
    values["evaluate"] |= {"batch_size": 1, "bootstrap_samples": 100}
    return Config.model_validate(values)


def _shorten(prepared: Prepared) -> None:
    """Keep as many pairs as a batch has, decided ones first, since training needs some."""
    for path in [path for side in ("train", "validation") if (path := prepared.pairs_file(side)).exists()]:
        pairs = sorted(read_pairs(path), key=lambda pair: pair.is_tie)[:PAIRS]
        shorter = path.with_suffix(".short")
        with PairWriter(shorter) as writer:
            for pair in pairs:
                writer.write(pair)
        shutil.move(shorter, path)


def _time(config: Config, root: Path, folder: Path) -> str:
    costs = [_cost(config, folder, name) for name in config.methods]
    rate = max(cost["seconds"] / max(1, cost["unet_forwards"]) for cost in costs)  # with the work around the UNet
    parts = [f"{stage} {duration(n * rate)}" for stage, n in forwards(config, root, folder).items() if n]
    return f"at most about: {', '.join(parts)}"


def _peak_memory(stage: Callable[[], object]) -> int:
    """Run a stage; returns the peak bytes of tensors on the GPU, or without a GPU of the process so far."""
    if not torch.cuda.is_available():
        stage()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch.cuda.reset_peak_memory_stats()
    stage()
    return torch.cuda.max_memory_allocated()


def _memory(peaks: dict[str, int]) -> str:
    stage = max(peaks, key=peaks.__getitem__)
    if torch.cuda.is_available():
        total, whose = torch.cuda.get_device_properties(0).total_memory, "the GPU's"
    else:
        total, whose = psutil.virtual_memory().total, "this machine's"
    how = f"with as many pairs at a time as in training (at most {PAIRS}), but rollouts of {SAMPLED} prompts"
    return f"{stage} took {peaks[stage] / GIB:.1f} of {whose} {total / GIB:.1f} GiB, {how}"


def forwards(config: Config, root: Path, folder: Path) -> dict[str, float]:
    """UNet forwards (samples) of each whole stage; those of `align` are scaled up from the miniature."""
    prompts = config.prepare.prompts
    read, _ = read_prompts(root / prompts.source, field=prompts.field, max_prompts=prompts.max_prompts)
    num_prompts = len(read) * (1 - config.prepare.validation_fraction - config.prepare.test_fraction)
    seeds, counts = len(config.training_seeds), {}
    for name in config.train_preference:
        training = config.preference_models[name]
        trained = 0 if training.is_trained else training.steps * training.batch_size
        counts[f"train_preference {name}"] = trained * training.forwards_per_pair(config.counted_sampling)
    for name in config.methods:

        def per_prompt(name: str = name) -> float:
            return _cost(config, folder, name)["unet_forwards"] / SAMPLED

        pairs = num_pairs(config, root) or 0
        method = config.align[name]
        counts[f"align {name}"] = seeds * method.forwards(
            num_prompts=num_prompts, num_pairs=pairs, per_prompt=per_prompt
        )
    evaluate = config.evaluate
    columns = 1 + len(config.methods) * seeds + len(evaluate.published)
    checkpoints = sum(config.align[name].checkpoints * seeds for name in config.methods)
    test, validation = evaluate.num_prompts * evaluate.images_per_prompt * columns, evaluate.num_validation_prompts
    steps = {name: len(build_scheduler(sampler).timesteps) for name, sampler in evaluate.samplers.items()}
    sampled = test * sum(steps.values()) + validation * (1 + checkpoints) * steps[evaluate.deciding]
    return {**counts, "evaluate": sampled * (1.0 if config.model.is_distilled else 2.0)}


def _cost(config: Config, folder: Path, name: str) -> dict[str, Any]:
    return read_json(Workspace(config, folder).aligned(name, config.training_seeds[0]) / "metrics.json")
