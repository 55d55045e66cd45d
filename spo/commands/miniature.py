"""Find in a minute what would end a run after hours.

First come the checks without a model. Then all stages run in miniature, in a temporary folder, with the profile's own
models and data: a few prompts and pairs, two rollouts, two steps, with as many pairs and images at a time as in the
whole run. The time of each whole stage is estimated from its own miniature, without loading. Where all this takes more
than a minute, that is said before it starts.
"""

import importlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from spo.commands.check_duration import evaluation_forwards, rough_seconds
from spo.commands.disk_estimate import num_pairs, room
from spo.commands.preflight import Finding, show_findings, size_text
from spo.config import Config
from spo.data.preferences import PairWriter, read_pairs
from spo.data.prompts import read_prompts
from spo.errors import DataError, SpoError, one_line
from spo.evaluation.image_scorer import ImageScorer
from spo.evaluation.model_variants import BASE, ModelVariant, tasks
from spo.models.schedulers import build_scheduler
from spo.pipeline import PIPELINE, STAGES
from spo.runtime.device import memory_advice
from spo.runtime.files import read_json
from spo.runtime.text import duration
from spo.stages import prepare
from spo.tracking import NullTracker, Tracker
from spo.workspace import Prepared, Workspace

PROMPTS, SAMPLED, PAIRS_READ, PAIRS = 30, 2, 256, 64
GIB = 2**30
NEVER = 1e9  # seconds; the miniature saves no states


class Recorder(NullTracker):
    """Keeps the numbers that a stage reports."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.rows.append(metrics)

    def all(self, name: str) -> list[Mapping[str, Any]]:
        """The reports that have a number of this name."""
        return [row for row in self.rows if name in row]


def check_all(config: Config, root: Path, show: Callable[[Finding], None]) -> bool:
    """Pass each finding to `show`; returns whether all are good."""
    if not show_findings(config, root, show):
        return False
    small = miniature(config, root)
    try:
        temporary = tempfile.TemporaryDirectory(prefix="spo-check-")
    except OSError as error:
        show(Finding("temporary folder", False, f"{one_line(error)}; set TMPDIR to a folder with room"))
        return False
    with temporary as folder:
        found = _temporary_room(small, Path(folder))
        show(found)
        if not found.good:
            return False
        seconds = rough_seconds(small)
        long = f"this takes longer than a minute, about {duration(seconds)}"
        show(Finding("miniature of all stages", True, long if seconds > 60 else f"about {duration(seconds)}"))
        return _run_miniature(config, small, root, Path(folder), show)


def _temporary_room(small: Config, folder: Path) -> Finding:
    """Whether the temporary folder has room for what the miniature writes."""
    needed = sum(each.kept + each.passing for each in room(small, folder, copies=1, states=0).values())
    free = shutil.disk_usage(folder).free
    detail = f"{folder.parent}: {size_text(free)} are free, about {size_text(needed)} will be written"
    remedy = "" if free > needed else "; set TMPDIR to a folder with more room"
    return Finding("temporary folder", free > needed, detail + remedy)


def _run_miniature(config: Config, small: Config, root: Path, folder: Path, show: Callable[[Finding], None]) -> bool:
    seed = config.training_seeds[0]
    memory: dict[str, int] = {}
    reports: dict[str, Recorder] = {}
    to_do: list[tuple[Any, ...]] = []
    for name in PIPELINE:
        items: dict[str, list[tuple[Any, ...]]] = {
            "method": [(method, seed) for method in config.methods],
            "preference_model": [(model,) for model in config.train_preference],
        }
        to_do += [(name, *item) for item in items.get(STAGES[name].item, [()])]
    for name, *job in to_do:
        stage = " ".join([name, *job[:1]])
        module = importlib.import_module(f"spo.stages.{name}")
        tracker = reports[stage] = Recorder()
        run = partial(module.run, small, *job, root=folder, tracker=tracker)
        start = time.perf_counter()
        try:
            memory[stage] = _peak_memory(partial(_prepare, small, config, folder) if stage == "prepare" else run)
            if stage == "prepare":
                _shorten(Workspace(small, folder).prepared)
            if stage == "evaluate":
                memory[stage] = max(memory[stage], _peak_memory(partial(_paint_batch, small, folder, tracker)))
        except SpoError as error:
            show(Finding(f"{stage} in miniature", False, str(error)))
            return False
        show(Finding(f"{stage} in miniature", True, f"{time.perf_counter() - start:.1f} s"))
    show(Finding("time", True, _time(config, small, root, folder, reports)))
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
    values["evaluate"] |= {"bootstrap_samples": 100}
    values["safety"] |= {"save_every_seconds": NEVER}
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


def _time(config: Config, small: Config, root: Path, folder: Path, reports: Mapping[str, Recorder]) -> str:
    """The time of each whole stage, from the seconds that a forward took in its own miniature, with all around it."""
    whole = forwards(config, root, folder)
    rates = {stage: _rate(stage, small, folder, reports[stage]) for stage, count in whole.items() if count}
    shared = config.launch.num_processes
    parts = [f"{stage} {duration(whole[stage] * rate / shared)}" for stage, rate in rates.items()]
    return f"about: {', '.join(parts)}, without loading{'' if shared == 1 else f', with {shared} processes'}"


def _paint_batch(small: Config, folder: Path, tracker: Tracker) -> None:
    """Paint and score a whole batch of the evaluation, by the base with the deciding sampler; report its seconds."""
    settings, scorer = small.evaluate, ImageScorer(small, folder)
    images = tasks(Workspace(small, folder).prepared, "test", 2, -(-settings.batch_size // 2), settings.seed + 1)
    batch = images[: settings.batch_size]
    with memory_advice(f"lower evaluate.batch_size, now {settings.batch_size}"):
        scorer.scores(ModelVariant(BASE), batch, settings.deciding, split="a whole batch")
    tracker.log_metrics({"seconds_an_image": scorer.seconds / len(batch)})


def _rate(stage: str, small: Config, folder: Path, reported: Recorder) -> float:
    """Seconds for each forward of the network: in the second step or round, since the first one warms up."""
    kind, _, name = stage.partition(" ")
    if kind == "train_preference":
        training = small.preference_models[name]
        in_step = training.batch_size * training.forwards_per_pair(small.counted_sampling)
        return reported.all("step_seconds")[-1]["step_seconds"] / in_step
    if kind == "evaluate":
        steps = len(build_scheduler(small.evaluate.samplers[small.evaluate.deciding]).timesteps)
        passes = 1.0 if small.model.is_distilled else 2.0
        return reported.all("seconds_an_image")[-1]["seconds_an_image"] / (steps * passes)
    cost = _cost(small, folder, name)
    first = [row for row in reported.all("unet_forwards") if row["round"] == 1]
    seconds, count = (cost[key] - (first[-1][key] if first else 0) for key in ("seconds", "unet_forwards"))
    return seconds / max(1, count)


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
            cost = _cost(config, folder, name)
            return cost["unet_forwards"] / (SAMPLED * cost["rounds"])

        pairs = num_pairs(config, root) or 0
        method = config.align[name]
        counts[f"align {name}"] = seeds * method.forwards(
            num_prompts=num_prompts, num_pairs=pairs, per_prompt=per_prompt
        )
    return {**counts, "evaluate": evaluation_forwards(config)}


def _cost(config: Config, folder: Path, name: str) -> dict[str, Any]:
    return read_json(Workspace(config, folder).aligned(name, config.training_seeds[0]) / "metrics.json")
