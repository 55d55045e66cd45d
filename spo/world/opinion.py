"""The generic opinion that labels the embedded default's preference pairs.

Like people who compare generated pictures, it gives more weight to content and layout than to finish, it errs, and it
ties. In units of standard deviations over the pool of pictures:

    utility = sqrt(share) * finish + sqrt(1 - share) * (alignment + layout) / |alignment + layout|

with the oracle's finish = vivid + crisp + clean and layout = centred. So `share` is finish's part of the utility's
variance if the terms are independent. The first picture is preferred if
utility_0 - utility_1 + temperature * logistic noise > 0, and it is a tie if that lies within +-tie.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from spo.world.oracle import oracle_scores


@dataclass(frozen=True)
class Opinion:
    share: float
    temperature: float
    tie: float

    def utility(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Utilities (n,) of pictures (n, 3, h, w) in [0, 1] for their prompts."""
        scores = oracle_scores(pictures, prompts)
        finish = scores["vivid"] + scores["crisp"] + scores["clean"]
        return combine(finish, scores["alignment"], scores["centred"], share=self.share)

    def label(self, utility_0: Tensor, utility_1: Tensor, generator: Generator) -> Tensor:
        """Label (n,) of the first picture: 1 preferred, 0 not, 0.5 a tie."""
        u = torch.rand(len(utility_0), generator=generator).clamp(1e-6, 1 - 1e-6)
        gap = utility_0 - utility_1 + self.temperature * torch.logit(u)
        return torch.where(gap.abs() < self.tie, 0.5, (gap > 0).float())


def combine(finish: Tensor, alignment: Tensor, layout: Tensor, *, share: float) -> Tensor:
    """Utilities (n,) of the three terms (n,), each standardised over the n."""
    content = _standardised(_standardised(alignment) + _standardised(layout))
    return share**0.5 * _standardised(finish) + (1 - share) ** 0.5 * content


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std().clamp_min(1e-6)
