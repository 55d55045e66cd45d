"""The rule that chooses a checkpoint: the same for every method, on prompts that are not reported.

Long training can raise the preference model's score at the cost of alignment. Among the checkpoints whose guarded
means have not fallen by more than a tolerance, the rule takes the one with the highest primary mean. If all have
fallen by more, it takes the one that fell least.
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
    """Index of the chosen candidate, from the mean scores of candidates and base.

    tolerance: how far a guarded mean may fall, in that score's units.
    """
    falls = [max((base[name] - means[name] for name in guarded), default=0.0) for means in candidates]
    kept = [i for i, fall in enumerate(falls) if fall <= tolerance]
    if kept:
        return max(kept, key=lambda i: candidates[i][primary])
    return min(range(len(candidates)), key=lambda i: falls[i])
