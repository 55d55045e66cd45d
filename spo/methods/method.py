"""What the training loop knows of a method: rounds of pairs, and the loss of pairs.

A round is one turn of the loop: the method collects pairs, the loop trains on them. Whatever is random in a round is
keyed by (seed, epoch, what it is for), so that any round can be collected without those before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from spo.core.types import Loss


class TrainingPairs(Protocol):
    """n win-lose pairs, at timesteps t."""

    @property
    def t(self) -> Tensor:
        """(n,) int"""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice) -> Self: ...


P = TypeVar("P", bound=TrainingPairs)  # the pairs of one method


@dataclass(frozen=True)
class Tally:
    """What became of a round's candidates at one timestep."""

    t: int
    num_branched: int  # pairs there could have been
    num_kept: int
    margin: float  # mean over all of them, kept or not


@dataclass(frozen=True)
class Round(Generic[P]):
    """The pairs to train on next, None where none was kept, and what there is to record."""

    pairs: P | None
    tallies: Sequence[Tally]
    measured: Mapping[str, float] = field(default_factory=dict)  # more columns of the history, the same every round


class Method(Protocol[P]):
    """What a method collects and what it minimises."""

    @property
    def rounds_per_epoch(self) -> int: ...

    def collect(self, epoch: int, *, skip: int = 0) -> Iterator[Round[P]]:
        """The epoch's rounds but the first `skip`; each is to be trained on before the next is asked for."""
        ...

    def loss(self, pairs: P) -> Loss:
        """The mean loss of the pairs; the policy as it stands, the reference with the adapter off."""
        ...
