"""The stages: what each of them is, reads and may do. Every list of stages is read off this one table."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One stage; its code is `spo/stages/<name>.py`, with a function `run`."""

    name: str
    help: str  # one line for `--help`
    sections: tuple[str, ...] = ()  # of the configuration, recorded with its tracked run
    inputs: tuple[tuple[str, str], ...] = ()  # prepared data that it reads: "prompts" or "preferences", and a side
    item: Literal["", "preference_model", "method"] = ""  # what it runs for each of; a method has a training seed too
    distributed: bool = False  # `launch.num_processes` processes share its work
    resumable: bool = False  # a stopped run continues where it was
    checked: bool = False  # looks at its start for what later stages lack
    in_pipeline: bool = True  # a stage of dvc.yaml that `repro` runs


_TABLE = (
    Stage("prepare", "check prompts and preferences and split them", ("seed", "model", "prepare"), checked=True),
    Stage(
        "train_preference",
        "train one preference model",
        ("seed", "model", "sampling", "labels"),  # and the model's own section
        (("preferences", "train"), ("preferences", "validation")),
        item="preference_model",
        distributed=True,
        resumable=True,
        checked=True,
    ),
    Stage(
        "align",
        "align the diffusion model by one method",
        ("model", "sampling", "labels"),  # and the method's own section
        (("prompts", "train"),),
        item="method",
        distributed=True,
        resumable=True,
        checked=True,
    ),
    Stage(
        "evaluate",
        "compare base and aligned models",
        ("model", "sampling", "evaluate"),
        (("prompts", "validation"), ("prompts", "test")),
        distributed=True,
        checked=True,
    ),
    Stage("report", "write the report"),
    Stage("pretrain", "make the shipped models and data of `tiny` anew", in_pipeline=False),
)
STAGES = {stage.name: stage for stage in _TABLE}  # in the order in which they run
PIPELINE = tuple(stage.name for stage in _TABLE if stage.in_pipeline)
DISTRIBUTED = tuple(stage.name for stage in _TABLE if stage.distributed)  # these load the diffusion model
