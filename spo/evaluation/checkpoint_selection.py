"""Which checkpoint of a method is reported: one rule for every method, on prompts that are not reported.

Over-optimisation is real: past some point the preference model's favour costs alignment. Of the checkpoints whose
guarded means have not fallen by more than a tolerance, the rule takes the one with the highest primary mean; if
all have fallen, the one that fell least.
"""

from collections.abc import Mapping, Sequence


def choose_checkpoint(
    candidates: Sequence[Mapping[str, float]],
    base: Mapping[str, float],
    *,
    primary: str,
    guarded: Sequence[str],
    tolerance: float,
) -> int:
    """Index of the chosen one of the candidates' mean scores, given the base's.

    tolerance: the fall of a guarded mean that is forgiven, in that score's units.
    """
    falls = [max((base[name] - means[name] for name in guarded), default=0.0) for means in candidates]
    kept = [i for i, fall in enumerate(falls) if fall <= tolerance]
    if kept:
        return max(kept, key=lambda i: candidates[i][primary])
    return min(range(len(candidates)), key=lambda i: falls[i])
