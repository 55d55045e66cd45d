"""The settings with which a job fits a GPU, found by trying them in the estimate of its memory."""

from collections.abc import Iterator
from functools import reduce
from typing import Any

from spo.commands.memory_estimate import at_a_time, estimate
from spo.config import Config


def remedy(config: Config, job: str, memory: float) -> str | None:
    """The settings with which a job fits a GPU of so many bytes; None if none of those that are tried makes it fit.

    Tried in this order: fewer pairs at a time, gradient checkpointing, a latent preference model, a sharded network if
    there are several processes, 8-bit moments. The first two and the fourth change no result, and all after the second
    keep the checkpointing. If a latent model is proposed, the next setting that fits is named as well.
    """
    found = []
    for other, changes in _alternatives(config, job):
        if (settings := _fitting(config, other, changes, memory)) is not None:
            text = ", ".join(f"{key}: {str(value).lower()}" for key, value in settings.items())
            instead = "" if other == job else f"train {other.partition(' ')[2]} instead"
            found.append(" with ".join(filter(None, (instead, text))))
            if other == job and not any(key.endswith(".preference_model") for key in settings):
                break
    return "; or ".join(found) or None


def _fitting(config: Config, job: str, changes: dict[str, object], memory: float) -> dict[str, object] | None:
    """The changes, with the largest micro-batch with which the job fits; None if it does not."""
    watches = job.startswith("align ") and config.align[job.partition(" ")[2]].watch is not None
    for less in ({}, {"evaluate.batch_size": 1}) if watches else ({},):  # the watch paints as many images at once
        for size in ({}, *({_size_key(job): size} for size in _halved(config, job))):
            tried = {**changes, **less, **size}
            if estimate(reduce(lambda now, item: with_setting(now, *item), tried.items(), config), job).fits(memory):
                return tried
    return None


def with_setting(config: Any, key: str, value: object) -> Any:
    """Settings with another value under a dotted key, which is not checked."""
    first, _, rest = key.partition(".")
    now = config.get(first) if isinstance(config, dict) else getattr(config, first, None)
    changed = with_setting(now, rest, value) if rest else value
    return {**config, first: changed} if isinstance(config, dict) else config.model_copy(update={first: changed})


def _alternatives(config: Config, job: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Jobs to do in place of `job`, mostly itself, and changes of settings."""
    stage, _, name = job.partition(" ")
    yield job, {}
    if stage == "evaluate":
        return
    less: dict[str, object] = {} if config.model.gradient_checkpointing else {"model.gradient_checkpointing": True}
    yield job, less
    latent = next((key for key, each in config.preference_models.items() if each.kind == "latent"), None)
    scorer = name if stage == "train_preference" else config.align[name].scorer
    if latent and scorer and config.preference_models[scorer].kind == "pixel":
        if stage == "train_preference":
            yield f"{stage} {latent}", less
        else:
            yield job, {f"align.{name}.preference_model": latent, **less}
    several = stage == "align" and config.launch.num_processes > 1
    if several and not config.launch.shard_network and not config.unshardable():
        yield job, {**less, "launch.shard_network": True}
    if stage == "align" and config.launch.shard_network:
        return
    eight = "preference_models.{}.eight_bit" if stage == "train_preference" else "align.{}.optimizer.eight_bit"
    yield job, {**less, eight.format(name): True}


def _size_key(job: str) -> str:
    stage, _, name = job.partition(" ")
    if stage == "evaluate":
        return "evaluate.batch_size"
    return f"{'preference_models' if stage == 'train_preference' else stage}.{name}.micro_batch_size"


def _halved(config: Config, job: str) -> list[int]:
    """Half of what the job has in memory at a time, half of that, and so on to 1."""
    stage, _, name = job.partition(" ")
    if stage == "evaluate":
        size = config.evaluate.batch_size
    else:
        size = at_a_time(config, config.align[name] if stage == "align" else config.preference_models[name])
    sizes = []
    while size > 1:
        size //= 2
        sizes.append(size)
    return sizes
