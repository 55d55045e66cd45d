"""The generic opinion that labels the embedded default's preference pairs.

As people's choices between generated pictures do, it weighs what the picture shows and where above how well it
is finished, it errs, and it ties. In units of standard deviations over the pool of pictures:

    utility = sqrt(share) * finish + sqrt(1 - share) * (alignment + layout) / |alignment + layout|

with finish = vivid + crisp + clean and layout = centred of the oracle, so that `share` is the part of the
utility's variance that is owed to finish where the terms are independent. The first picture is preferred when
utility_0 - utility_1 + temperature * logistic noise > 0, and it is a tie when that lies within +-tie.
"""

import torch
from torch import Generator, Tensor

from spo.world.oracle import oracle_scores


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std().clamp_min(1e-6)


def utility(pictures: Tensor, prompts: list[str], *, share: float) -> Tensor:
    """Utilities (n,) of pictures (n, 3, h, w) in [0, 1] for their prompts."""
    seen = oracle_scores(pictures, prompts)
    return combine(seen["vivid"] + seen["crisp"] + seen["clean"], seen["alignment"], seen["centred"], share=share)


def combine(finish: Tensor, alignment: Tensor, layout: Tensor, *, share: float) -> Tensor:
    """Utilities (n,) of the three terms (n,), each standardised over the n."""
    content = _standardised(_standardised(alignment) + _standardised(layout))
    return share**0.5 * _standardised(finish) + (1 - share) ** 0.5 * content


def label(utility_0: Tensor, utility_1: Tensor, *, temperature: float, tie: float, generator: Generator) -> Tensor:
    """Label (n,) of the first picture: 1 preferred, 0 not, 0.5 a tie."""
    u = torch.rand(len(utility_0), generator=generator).clamp(1e-6, 1 - 1e-6)
    gap = utility_0 - utility_1 + temperature * torch.logit(u)
    return torch.where(gap.abs() < tie, 0.5, (gap > 0).float())
