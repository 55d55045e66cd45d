"""The interface between the training loop and a method: rounds of examples, and the loss of examples.

In a round the method collects examples and the loop trains on them. The random numbers of a round are keyed by
(seed, epoch, purpose), so any round can be collected without the earlier ones.

The method of kind `spo` is the class METHOD of spo/methods/spo.py; it takes its section of the profile.
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
    """The counts of a round's candidates at one timestep."""

    t: float
    num_branched: int  # possible examples
    num_kept: int
    margin: float  # mean over the possible examples


@dataclass(frozen=True)
class Round(Generic[E]):
    """The examples to train on next (None if none was kept), and measurements."""

    examples: E | None
    tallies: Sequence[Tally]
    measured: Mapping[str, float] = field(default_factory=dict)  # columns of the history, the same in every round


class Method(Protocol[E]):
    """Collects examples and computes their loss."""

    @property
    def rounds_per_epoch(self) -> int: ...

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[E]]:
        """The rounds of the epoch after the first `skip`; train on each before asking for the next."""
        ...

    def loss(self, examples: E) -> Loss:
        """The mean loss of the examples."""
        ...


@dataclass(frozen=True)
class Inputs:
    """The models and data that a method may learn from; it loads what it needs."""

    policy: Any  # a core.types.Denoiser, or a LatentDiffusion for a method that adds noise to data
    prompts: Sequence[str]  # the training prompts
    load_scorer: Callable[[ScoringConfig], Scorer]  # the preference model
    load_pairs: Callable[[], LabelledPairs]  # the labelled training pairs


def build_method(config: MethodConfig, inputs: Inputs, *, seed: int) -> Method[Any]:
    """The method of a section of the profile."""
    return importlib.import_module(f"spo.methods.{config.method}").METHOD.build(config, inputs, seed=seed)
