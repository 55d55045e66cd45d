"""How far the labels of a pool of pairs agree with the oracle's scores and with the opinion behind them."""

import torch

from spo.world.opinion import Opinion, finish
from spo.world.oracle import oracle_scores
from spo.world.pretraining.pairs import Pool

# Pick-a-Pic, decided pairs of validation and test (LPO, arXiv 2502.01051, table 18): LAION's aesthetic predictor,
# CLIP-H and PickScore, the best model. Ties: Pick-a-Pic, arXiv 2305.01569.
PUBLISHED = {"aesthetic": 0.540, "alignment": 0.618, "opinion": 0.719, "ties": 0.12}
# what the embedded world's labels are made to have; a proxy agrees a little less than an exact score would
RANGES = {"aesthetic": (0.55, 0.60), "alignment": (0.61, 0.66), "opinion": (0.71, 0.75), "ties": (0.11, 0.13)}


@torch.no_grad()
def agreement(pool: Pool, opinion: Opinion) -> dict[str, float]:
    """Shares of decided pairs whose preferred picture scores higher, by score, and `ties`, the share of all pairs.

    `opinion` is the opinion without noise, `finish` a part of it and of `aesthetic`.
    """
    scores = oracle_scores(pool.pictures, pool.prompts)
    compared = {
        "aesthetic": scores["aesthetic"],
        "alignment": scores["alignment"],
        "opinion": opinion.utility(pool.pictures, pool.prompts),
        "finish": finish(scores),
    }
    decided = pool.label != 0.5
    first, second, wins = pool.first[decided], pool.second[decided], pool.label[decided] == 1
    shares = {name: ((each[first] > each[second]) == wins).float().mean() for name, each in compared.items()}
    return {name: value.item() for name, value in {**shares, "ties": (~decided).float().mean()}.items()}
