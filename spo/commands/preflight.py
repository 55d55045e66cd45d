"""Checks of a run before it starts, without loading a model: do the files and models that it names exist?

Every stage calls `require` at its start, so that a mistake in a later stage's settings shows in the first minute.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from spo.commands.disk_estimate import room, size_of
from spo.config import Config, MetricConfig
from spo.config.metrics import split_hub_file
from spo.errors import ConfigError, DataError, one_line
from spo.pipeline import DISTRIBUTED, PIPELINE
from spo.runtime.hub import connect, is_name
from spo.workspace import Workspace

# what diffusers and our own counts raise if a profile does not fit its model; the stage that loads it names the fault
UNFIT = (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str  # a setting's dotted name, or what else was checked
    good: bool
    detail: str
    stages: tuple[str, ...] = ()  # that cannot run without it
    doubtful: bool = False  # good as far as is known, but an estimate speaks against it


def require(config: Config, stage: str, root: Path) -> None:
    """ConfigError if something is missing that the stage reads; a warning for each thing that a later stage reads."""
    missing = [finding for finding in findings(config, root) if not finding.good]
    for finding in missing:
        if stage in finding.stages:
            raise ConfigError(f"{finding.what}: {finding.detail}")
        where = " and ".join(finding.stages)
        print(f"warning: {where} will fail: {finding.what}: {finding.detail}", file=sys.stderr, flush=True)


def show_findings(
    config: Config, root: Path, show: Callable[[Finding], None], stages: Sequence[str] = PIPELINE
) -> bool:
    """Pass each finding about `stages` to `show`; returns whether all are good."""
    good = True
    for finding in chain(findings(config, root), _sides(config, root), _memory(config, stages)):
        if set(stages) & set(finding.stages):
            show(finding)
            good = good and finding.good
    return good


def require_all(config: Config, root: Path) -> None:
    """ConfigError if something is missing that any stage reads: DVC removes a stage's outputs before it starts it."""
    missing = [finding for finding in findings(config, root) if not finding.good]
    if missing:
        more = f" (and {len(missing) - 1} more: `python -m spo check --quick`)" if missing[1:] else ""
        raise ConfigError(f"{missing[0].what}: {missing[0].detail}{more}")


def findings(config: Config, root: Path) -> list[Finding]:
    """The results of all checks of the profile's files, models and disk."""
    return [*_data(config, root), *_models(config), *_samplers(config), *_disk(config, root)]


def _data(config: Config, root: Path) -> Iterator[Finding]:
    source = config.prepare.prompts.source
    good, detail = _prompts(root / source)
    yield Finding("prepare.prompts.source", good, f"{source} {detail}", ("prepare",))
    if config.prepare.preferences is None:
        return
    source = config.prepare.preferences.source
    if source.startswith("hub:"):
        good, detail = _hub(source.removeprefix("hub:").partition("@")[0], kind="dataset")
        if not good and Workspace(config, root).prepared.pairs_file("train").is_file():
            good, detail = True, "is not needed: its pairs are prepared already"
    else:
        good, detail = _pairs(root / source, config.prepare.preferences.split)
    yield Finding("prepare.preferences.source", good, f"{source} {detail}", ("prepare",))


def _sides(config: Config, root: Path) -> list[Finding]:
    """A note for each side of the prompts that has fewer than `evaluate` asks for; none if they cannot be read yet."""
    from spo.data.prompts import read_prompts, split_of

    source = config.prepare.prompts
    try:
        prompts, _ = read_prompts(root / source.source, field=source.field, max_prompts=source.max_prompts)
        shortfalls = split_of(prompts, config).shortfalls(config)
    except DataError:  # `prepare` reports it
        return []
    return [Finding(setting, True, detail, ("evaluate",), doubtful=True) for setting, detail in shortfalls.items()]


def _prompts(path: Path) -> tuple[bool, str]:
    from spo.data.prompt_files import SUFFIXES, prompt_files  # slow to import, and every command would

    return _folder(lambda: prompt_files(path)) if path.is_dir() else _file(path, SUFFIXES)


def _pairs(path: Path, split: str) -> tuple[bool, str]:
    from spo.data.preference_files import SUFFIXES, preference_files

    return _folder(lambda: preference_files(path, split)[0]) if path.is_dir() else _file(path, SUFFIXES)


def _folder(files: Callable[[], list[Path]]) -> tuple[bool, str]:
    try:
        return True, f"is a folder of {len(files())} files"
    except DataError as error:
        return False, f"cannot be used: {error}"


def _file(path: Path, suffixes: tuple[str, ...]) -> tuple[bool, str]:
    if not path.is_file():
        return False, "does not exist; name a file that does"
    if path.suffix.lower() not in suffixes:
        return False, f"is of an unknown kind; use one of {', '.join(suffixes)}"
    if not path.stat().st_size:
        return False, "is empty"
    return True, f"is there, {size_text(path.stat().st_size)}"


def _models(config: Config) -> Iterator[Finding]:
    model, evaluate = config.model, config.evaluate
    if model.is_single_file:
        good, detail = _file(Path(model.path), (".safetensors",))
        yield Finding("model.path", good, f"{model.path} {detail}", DISTRIBUTED)
    if (repository := model.config if model.is_single_file else model.path) is not None:
        key = "model.config" if model.is_single_file else "model.path"
        yield _repository(key, repository, "model_index.json", DISTRIBUTED)
    if model.vae:
        yield _repository("model.vae", model.vae, "config.json", DISTRIBUTED)
    for name in config.train_preference:
        preference, section = config.preference_models[name], f"preference_models.{name}"
        for key, (source, file) in preference.repositories().items():
            yield _repository(f"{section}.{key}", source, file, ("train_preference",))
        if not preference.is_trained and (labels := config.labels_of(name).model):
            where = "labels" if preference.labels is None else f"{section}.labels"
            yield _repository(f"{where}.model", labels, "config.json", ("train_preference",))
        for metric in preference.filter.metrics if preference.filter and not preference.is_trained else ():
            yield from _metric(f"{section}.filter.{metric.scores[0]}", metric, "train_preference")
    needed = {evaluate.primary, *evaluate.guarded}
    for metric in evaluate.metrics:
        if needed & set(metric.scores):
            yield from _metric(f"evaluate.metrics.{metric.scores[0]}", metric, "evaluate")
    for name in config.methods:
        method = config.align[name]
        for key, repository in method.repositories().items():
            yield _repository(f"align.{name}.{key}", repository, "config.json", ("align",))
        if method.watch and method.watch.stop_after_worse:  # else the training goes on without the metric
            yield from _metric(f"align.{name}.watch.metric", method.watch.metric, "align")
    for name, lora in evaluate.loras.items():
        yield _repository(f"evaluate.loras.{name}", lora.source, None, ("evaluate",))
    for name, network in evaluate.networks.items():
        file = f"{network.subfolder}/config.json" if network.subfolder else "config.json"
        yield _repository(f"evaluate.networks.{name}", network.source, file, ("evaluate",))
    if config.launch.accelerate_config:
        source = config.launch.accelerate_config
        good, detail = _file(Path(source), (".yaml", ".yml", ".json"))
        yield Finding("launch.accelerate_config", good, f"{source} {detail}", DISTRIBUTED)


def _metric(what: str, metric: MetricConfig, stage: str) -> Iterator[Finding]:
    """A finding for each repository and file of a metric."""
    for fields, file in ((metric.models, "config.json"), (metric.tokenizers, None)):
        for field in fields:
            if (source := getattr(metric, field)) is not None:
                yield _repository(f"{what}.{field}", source, file, (stage,))
    for field in metric.files:
        source = getattr(metric, field)
        if Path(source).is_file():
            good, detail = True, f"is there, {size_text(size_of(Path(source)))}"
        elif (on_hub := split_hub_file(source)) is not None:
            good, detail = _hub(*on_hub)
        else:
            good, detail = False, "is no file here; put one there, or name one of the hub as OWNER/NAME/FILE"
        yield Finding(f"{what}.{field}", good, f"{source} {detail}", (stage,))


def _samplers(config: Config) -> Iterator[Finding]:
    from spo.models.schedulers import build_scheduler  # slow to import, and every command would

    for name, sampler in config.evaluate.samplers.items():
        good, detail = True, sampler.description
        try:
            build_scheduler(sampler)
        except ConfigError as error:
            good, detail = False, str(error)
        yield Finding(f"evaluate.samplers.{name}", good, detail, ("evaluate",))


def _repository(what: str, name: str, file: str | None, stages: tuple[str, ...]) -> Finding:
    """A folder that has `file`, a name of the hub, or a file if no `file` is needed."""
    path = Path(name)
    if path.is_dir() or (file is None and path.is_file()):
        good = file is None or (path / file).is_file()
        detail = f"is there, {size_text(size_of(path))}" if good else f"has no {file}; it is no model's folder"
    elif is_name(name):
        good, detail = _hub(name, file)
    else:
        good, detail = False, "is no folder here; put the model there, or name one of the hub as OWNER/NAME"
    return Finding(what, good, f"{name} {detail}", stages)


def _hub(name: str, file: str | None = None, *, kind: str = "model") -> tuple[bool, str]:
    """Whether a repository of the hub is in its cache, or could be fetched; the hub is asked once whether it answers.

    A data set is read from the hub, not from its cache.
    """
    if kind == "model" and _is_cached(name, file):
        return True, "is in the hub's cache"
    missing = "is not in the hub's cache, and" if kind == "model" else "is a data set of the hub, but"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False, f"{missing} HF_HUB_OFFLINE forbids fetching it; bring the folder here and name it"
    if not connect():
        remedy = "fetch it where there is a network, bring the folder and name that"
        return False, f"{missing} the hub cannot be reached; {remedy}"
    return True, "will be fetched from the hub"


def _is_cached(name: str, file: str | None) -> bool:
    """Whether the hub's cache has a file of a repository; None: any file."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    if file is not None:
        return isinstance(try_to_load_from_cache(name, file), str)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    return any(folder.glob("snapshots/*/*"))


def _memory(config: Config, stages: Sequence[str]) -> Iterator[Finding]:
    """What each job of the stages needs on a GPU; it cannot run if what is counted exceeds the GPU's memory."""
    import torch  # slow to import, and every command would

    from spo.commands.memory_estimate import estimate, jobs
    from spo.commands.memory_remedy import remedy

    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    for job in jobs(config):
        stage = job.partition(" ")[0]
        if stage not in stages:
            continue
        try:
            found = estimate(config, job)
        except UNFIT as error:
            yield Finding(f"memory for {job}", True, f"cannot be estimated: {one_line(error)}", (stage,), doubtful=True)
            continue
        detail = f"about {size_text(found.total)} on a GPU, of which {size_text(found.counted)} are counted"
        doubtful = memory is not None and not found.fits(memory)
        if memory is not None:
            detail += f"; the GPU has {size_text(memory)}"
        if doubtful and memory is not None:
            detail += f", too little: {remedy(config, job, memory) or 'use a larger GPU, or a smaller model'}"
        good = memory is None or found.counted <= memory
        yield Finding(f"memory for {job}", good, detail, (stage,), doubtful)


def _disk(config: Config, root: Path) -> Iterator[Finding]:
    """Whether each stage has room beside the outputs of those before it; existing files are not counted again."""
    free, left = shutil.disk_usage(root).free, 0.0
    try:
        estimates = room(config, root)
    except UNFIT as error:
        yield Finding("disk", True, f"cannot be estimated: {one_line(error)}", PIPELINE, doubtful=True)
        return
    for stage, estimate in estimates.items():
        needed = left + max(0.0, estimate.kept + estimate.passing - estimate.there)
        left += 0.0 if estimate.there else estimate.kept
        remedy = "" if free > needed else "; make room, or move the project"
        detail = f"{size_text(free)} are free, about {size_text(needed)} will be needed{remedy}"
        yield Finding(f"disk for {stage}", free > needed, detail, (stage,))


def size_text(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
