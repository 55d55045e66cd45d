"""The vocabulary of the core. Shapes: b prompts, k candidates, n pairs, c h w of a latent."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """p(x_prev | x_t) = N(mean, std^2 I), and the x_0 that the model predicts from x_t."""

    mean: Tensor  # (b, c, h, w)
    std: Tensor  # (b, 1, 1, 1)
    x_0: Tensor  # (b, c, h, w)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Transition":
        """Apply the function to every tensor."""
        return Transition(function(self.mean), function(self.std), function(self.x_0))


@dataclass(frozen=True)
class Selection:
    """The best and the worst candidate of each prompt, and whether they differ enough to learn from."""

    win: Tensor  # (b,) int: index of a candidate
    lose: Tensor  # (b,) int
    keep: Tensor  # (b,) bool
    margin: Tensor  # (b,) in [0, 1]: difference of softmax([score of win, score of lose])


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and detached values to log."""

    value: Tensor  # ()
    metrics: dict[str, Tensor]
    log_ratio: Tensor | None = None  # (n, 2), of a loss over pairs: policy over reference, of win and lose


class Conditioning:
    """Named tensors (b, ...) that condition a model; only the model's adapter knows what they are."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"conditioning tensors differ in batch size: {sizes}")
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply the function to every tensor."""
        return type(self)({name: function(tensor) for name, tensor in self.tensors.items()})

    def __getitem__(self, index: Tensor | slice) -> Self:
        return self.map(lambda tensor: tensor[index])

    def repeat(self, k: int) -> Self:
        """The whole batch k times: (b, ...) -> (k * b, ...)."""
        return self.map(lambda tensor: tensor.repeat(k, *[1] * (tensor.ndim - 1)))

    def repeat_interleave(self, k: int) -> Self:
        """Each row k times: (n, ...) -> (n * k, ...)."""
        return self.map(lambda tensor: tensor.repeat_interleave(k, dim=0))

    @classmethod
    def cat(cls, parts: "Sequence[Conditioning]") -> Self:
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Rows:
    """n examples of a method: a dataclass of tensors (n, ...) and of the conditioning of n."""

    t: Tensor  # (n,) training timestep
    cond: Conditioning  # n

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply the function to every tensor (n, ...)."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {k: v.map(function) if k == "cond" else function(v) for k, v in values.items()}
        return type(self)(**mapped)

    @classmethod
    def cat(cls, parts: "Sequence[Self]") -> Self:
        """Join examples."""
        joined: dict[str, Any] = {}
        for field in fields(cls):
            column = [getattr(part, field.name) for part in parts]
            joined[field.name] = Conditioning.cat(column) if field.name == "cond" else torch.cat(column)
        return cls(**joined)


@dataclass(frozen=True, kw_only=True)
class Pairs(Rows):
    """Win-lose pairs of one denoising step; index 0 of the second axis is the win, 1 the lose."""

    x_t: Tensor  # (n, 1, c, h, w) where win and lose share x_t, else (n, 2, c, h, w)
    x_prev: Tensor  # (n, 2, c, h, w)
    t_prev: Tensor  # (n,)
    margin: Tensor  # (n,)

    @classmethod
    def cat(cls, parts: "Sequence[Self]") -> Self:
        """Join pairs; a shared x_t is expanded only if other parts do not share theirs."""
        width = max(part.x_t.shape[1] for part in parts)
        return super().cat([replace(part, x_t=part.x_t.expand(-1, width, -1, -1, -1)) for part in parts])


@dataclass(frozen=True, kw_only=True)
class Steps(Rows):
    """Single denoising steps with their advantages: of one x_prev each, or of k candidates that share x_t."""

    x_t: Tensor  # (n, c, h, w)
    x_prev: Tensor  # (n, c, h, w) or (n, k, c, h, w)
    t_prev: Tensor  # (n,)
    log_p: Tensor  # (n,) or (n, k): of x_prev under the policy that sampled it, mean over (c, h, w)
    advantage: Tensor  # (n,) or (n, k)


class Latents(Protocol):
    """Latents (m, c, h, w), in memory or in files."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Tensor) -> Tensor:
        """Those at index (...), int: (..., c, h, w)."""
        ...


@dataclass(frozen=True)
class LabelledPairs:
    """n preference pairs of encoded pictures with their labels; a picture that several pairs share is stored once.

    Pairs whose latents have one size make a bucket; there are several only where pictures keep their aspect.
    """

    pictures: Mapping[int, Latents]  # by bucket
    bucket: Tensor  # (n,) int
    members: Tensor  # (n, 2) int: the pictures of each pair, of its bucket
    label: Tensor  # (n, 2)
    weight: Tensor  # (n,)
    captions: Sequence[str]  # n

    def __len__(self) -> int:
        return len(self.label)

    def latent_shape(self, index: Tensor) -> tuple[int, ...]:
        """c, h, w of the pairs at `index` (k,), which are of one bucket."""
        return tuple(self._of(index).shape[1:])

    def latents(self, index: Tensor | None = None) -> Tensor:
        """Latents (k, 2, c, h, w), float32, of the pairs at `index` (k,), which are of one bucket; None: of all."""
        index = torch.arange(len(self)) if index is None else index
        return self._of(index)[self.members[index]].float()

    def by_bucket(self, index: Tensor) -> list[Tensor]:
        """The positions in `index` (k,) of the pairs of each bucket that occurs there."""
        bucket = self.bucket[index]
        return [(bucket == each).nonzero().flatten() for each in bucket.unique().tolist()]

    def _of(self, index: Tensor) -> Latents:
        buckets = self.bucket[index].unique().tolist()
        if len(buckets) != 1:
            raise ValueError(f"pairs of buckets {buckets} have latents of different sizes; take those of one bucket")
        return self.pictures[buckets[0]]

    @classmethod
    def of(cls, latents: Tensor, label: Tensor, weight: Tensor, captions: Sequence[str]) -> Self:
        """Pairs of latents (n, 2, c, h, w), none of which is in two pairs."""
        members = torch.arange(2 * len(latents)).view(-1, 2)
        bucket = torch.zeros(len(latents), dtype=torch.long)
        return cls({0: latents.flatten(0, 1)}, bucket, members, label, weight, captions)


class Noise(Protocol):
    """Random numbers keyed by their purpose, not by the order of calls (see core/noise.py)."""

    def normal(self, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (b, *shape) for grid step `step`; step -1 is the initial latent."""
        ...

    def choice(self, step: int, k: int) -> Tensor:
        """Uniform ints (b,) below k for grid step `step`."""
        ...


class Candidates:
    """k candidates of each of b prompts at one timestep, as a preference model sees them.

    The predicted x_0 and the decoded images are computed when they are first read.
    """

    def __init__(
        self,
        x: Tensor,
        t: float,
        text: Any,
        *,
        predict_x_0: Callable[[], Tensor],
        decode: Callable[[Tensor], Tensor],
        t_from: float | None = None,
    ):
        self.x = x  # (k, b, c, h, w)
        self.t = t  # in [0, 1000], where x_0 was predicted; 0 for the end of sampling
        self.t_from = t_from  # the time that the step to x started from; None where no step led there
        self.text = text  # the scorer's `encode` of the b prompts
        self._predict_x_0 = predict_x_0
        self._decode = decode

    def with_text(self, text: Any) -> "Candidates":
        """The same candidates with another scorer's text."""
        other = copy(self)
        other.text = text
        return other

    @cached_property
    def x_0(self) -> Tensor:
        """Predicted clean latents (k, b, c, h, w), by one forward of the policy for each candidate, none at t = 0."""
        return self._predict_x_0()

    @cached_property
    def images(self) -> Tensor:
        """`x_0` decoded: (k, b, 3, H, W) in [0, 1]."""
        return self._decode(self.x_0.flatten(0, 1)).unflatten(0, self.x.shape[:2])


class Denoiser(Protocol):
    """The part of a diffusion model that the core needs."""

    @property
    def timesteps(self) -> Tensor:
        """(T,), descending: the sampling grid."""
        ...

    @property
    def num_trainable(self) -> int:
        """How many steps of the grid, from the first on, have a density; a flow's last step has none."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """c, h, w"""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The guided model output (b, c, h, w) for x_t (b, c, h, w) at timesteps t (b,)."""
        ...

    def transition(
        self, output: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor, *, eta: float | None = None
    ) -> Transition:
        """p(x_prev | x_t) of the sampler, with its own eta if None; eta 0 has no noise."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [0, 1] of latents (b, c, h, w)."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context `predict` is the reference model: the same network with its adapter off."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """Inside this context `predict` is fastest, but the policy cannot be trained and the reference not be used."""
        ...


class Scorer(Protocol):
    """A preference model; higher is better."""

    def encode(self, prompts: Sequence[str]) -> Any:
        """Text features of b prompts; only the scorer reads them."""
        ...

    def __call__(self, candidates: "Candidates") -> Tensor:
        """Scores (k, b), float32."""
        ...
