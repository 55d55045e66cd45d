"""What the training loop knows of a method: rounds of examples, and the loss of examples.

A round is one turn of the loop: the method collects examples, the loop trains on them. Whatever is random in a round is
keyed by (seed, epoch, what it is for), so that any round can be collected without those before it.

The method of kind `spo` is the class METHOD of spo/methods/spo.py, and takes its section of the profile.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from spo.config import MethodConfig, ScoringConfig
from spo.core.types import LabelledPairs, Loss, Scorer


class Examples(Protocol):
    """n examples to train on, at timesteps t."""

    @property
    def t(self) -> Tensor:
        """(n,)"""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice) -> Self: ...


E = TypeVar("E", bound=Examples)  # the examples of one method


@dataclass(frozen=True)
class Tally:
    """What became of a round's candidates at one timestep."""

    t: float
    num_branched: int  # examples there could have been
    num_kept: int
    margin: float  # mean over all of them, kept or not


@dataclass(frozen=True)
class Round(Generic[E]):
    """The examples to train on next, None where none was kept, and what there is to record."""

    examples: E | None
    tallies: Sequence[Tally]
    measured: Mapping[str, float] = field(default_factory=dict)  # more columns of the history, the same every round


class Method(Protocol[E]):
    """What a method collects and what it minimises."""

    @property
    def rounds_per_epoch(self) -> int: ...

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[E]]:
        """The epoch's rounds but the first `skip`; each is to be trained on before the next is asked for."""
        ...

    def loss(self, examples: E) -> Loss:
        """The mean loss of the examples; the policy as it stands, the reference with the adapter off."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What a method may learn from; it loads what it needs."""

    policy: (
        Any  # a core.types.Denoiser; spo.models.latent_diffusion.LatentDiffusion where the method adds noise to data
    )
    prompts: Sequence[str]  # the training prompts
    load_scorer: Callable[[ScoringConfig], Scorer]  # the preference model
    load_pairs: Callable[[], LabelledPairs]  # the labelled training pairs


def build_method(config: MethodConfig, inputs: Inputs, *, seed: int) -> Method[Any]:
    """The method of a section of the profile."""
    return importlib.import_module(f"spo.methods.{config.method}").METHOD.build(config, inputs, seed=seed)
