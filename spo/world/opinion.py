"""The generic opinions that label preference pairs of the drawn world.

Like people who compare generated pictures, an opinion gives more weight to what a picture shows than to finish, it
errs, and it ties. In units of standard deviations over the pool of pictures:

    utility = sqrt(share) * finish + sqrt(1 - share) * content / |content|
    content = sum of sqrt(weight) * term over the terms of `content`

with the oracle's finish = vivid + crisp + clean. The terms of content are `alignment` with the prompt; `layout`, which
is centred; and `subject`, a large object on a light background, which neither prompt nor finish says. So `share` is
finish's part of the utility's variance if the terms are independent. The first picture is preferred if
utility_0 - utility_1 + temperature * logistic noise > 0, and it is a tie if that lies within +-tie.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from spo.world.oracle import oracle_scores
from spo.world.shape_fitting import trace

PICTURES_AT_A_TIME = 64
ALIGNED_AND_CENTRED = {"alignment": 0.5, "layout": 0.5}


@dataclass(frozen=True)
class Opinion:
    share: float
    temperature: float
    tie: float
    content: Mapping[str, float] = field(default_factory=lambda: ALIGNED_AND_CENTRED)

    def utility(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Utilities (n,) of pictures (n, 3, h, w) in [0, 1] for their prompts."""
        scores = oracle_scores(pictures, prompts)
        terms = {"alignment": scores["alignment"], "layout": scores["centred"]}
        if "subject" in self.content:
            terms["subject"] = subject(pictures)
        content = {name: terms[name] for name in self.content}
        return combine(finish(scores), content, self.content, share=self.share)

    def label(self, utility_0: Tensor, utility_1: Tensor, generator: Generator) -> Tensor:
        """Label (n,) of the first picture: 1 preferred, 0 not, 0.5 a tie."""
        u = torch.rand(len(utility_0), generator=generator).clamp(1e-6, 1 - 1e-6)
        gap = utility_0 - utility_1 + self.temperature * torch.logit(u)
        return torch.where(gap.abs() < self.tie, 0.5, (gap > 0).float())


def finish(scores: Mapping[str, Tensor]) -> Tensor:
    """How well pictures are made (n,), by the oracle's scores."""
    return scores["vivid"] + scores["crisp"] + scores["clean"]


def subject(pictures: Tensor) -> Tensor:
    """How large the object and how light its background is (n,), standardised over the n pictures (n, 3, h, w)."""
    drawings = [trace(part) for part in pictures.clamp(0, 1).split(PICTURES_AT_A_TIME)]
    radius = torch.cat([drawing.radius for drawing in drawings])
    background = torch.cat([drawing.outside for drawing in drawings]).mean(dim=1)
    return _standardised(_standardised(radius) + _standardised(background))


def combine(finish: Tensor, terms: Mapping[str, Tensor], weights: Mapping[str, float], *, share: float) -> Tensor:
    """Utilities (n,) of finish (n,) and of the terms of content, (n,) each; each is standardised over the n."""
    content = torch.stack([weight**0.5 * _standardised(terms[name]) for name, weight in weights.items()]).sum(dim=0)
    return share**0.5 * _standardised(finish) + (1 - share) ** 0.5 * _standardised(content)


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std().clamp_min(1e-6)
