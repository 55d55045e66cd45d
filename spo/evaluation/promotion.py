"""The rule that decides whether a new LoRA becomes champion, as a function of scores alone.

Candidate and rival are scored on the same prompts and seeds with the same samplers. The candidate is promoted iff

    primary   the 95% interval of its gain with the deciding sampler lies above zero, and
    guarded   the 95% interval of its change in each guarded score, with every sampler, lies above -tolerance
              (a non-inferiority test).

Intervals come from the paired bootstrap over prompts (see statistics.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spo.evaluation.statistics import Difference, paired_difference
from spo.runtime.hashing import text_digest

Image = tuple[str, int, int, str]  # sampler, prompt_index, image_index, prompt
Scored = Mapping[Image, Mapping[str, float]]


@dataclass(frozen=True)
class Check:
    """One requirement and what was measured."""

    metric: str
    sampler: str
    found: Difference
    above: float  # the bound below the whole interval

    @property
    def passed(self) -> bool:
        return self.found.low > self.above

    @property
    def description(self) -> str:
        found = self.found
        interval = f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        verb = "lies" if self.passed else "does not lie"
        return f"{self.metric} with {self.sampler}: {interval} {verb} above {self.above:g}"


@dataclass(frozen=True)
class Decision:
    """Whether the candidate becomes champion, and every reason."""

    promoted: bool
    rival: str
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> list[str]:
        """A line for each requirement, failed ones first."""
        return [check.description for check in sorted(self.checks, key=lambda check: check.passed)]

    @property
    def description(self) -> str:
        """The decision in a sentence."""
        if self.promoted:
            return f"promoted: it beats {self.rival} in {self.checks[0].metric} and falls in no guarded score"
        failed = " and ".join(dict.fromkeys(check.metric for check in self.checks if not check.passed))
        return f"not promoted: against {self.rival} the interval of {failed} does not lie above its bound"


def decide(
    candidate: Scored,
    rival: Scored,
    *,
    name: str,
    primary: str,
    tolerances: Mapping[str, float],
    deciding: str,
    samples: int = 10_000,
) -> Decision:
    """Compare the candidate's scores with those of the rival, called `name`, on the same images.

    primary: the score that must rise, with the sampler `deciding`.
    tolerances: for each guarded score, how far its interval may reach below zero, in that score's units.
    ValueError if the two were not scored on the same images.
    """
    if candidate.keys() != rival.keys():
        raise ValueError(f"candidate and rival share {len(candidate.keys() & rival.keys())} images, not all of theirs")

    def check(metric: str, sampler: str, above: float) -> Check:
        images = [image for image in candidate if image[0] == sampler]
        a, b = ([scores[image][metric] for image in images] for scores in (candidate, rival))
        return Check(metric, sampler, paired_difference(a, b, [image[3] for image in images], samples=samples), above)

    samplers = dict.fromkeys(image[0] for image in candidate)
    checks = [check(primary, deciding, 0.0)]
    checks += [check(metric, sampler, -tolerance) for metric, tolerance in tolerances.items() for sampler in samplers]
    return Decision(all(each.passed for each in checks), name, tuple(checks))


def scored(rows: Sequence[Mapping[str, str]], column: str, training_seed: str = "") -> Scored:
    """The scores of a column, from the rows of scores.csv."""
    named = ("column", "training_seed", "sampler", "prompt_index", "image_index", "prompt")
    return {
        (row["sampler"], int(row["prompt_index"]), int(row["image_index"]), row["prompt"]): {
            name: float(value) for name, value in row.items() if name not in named
        }
        for row in rows
        if row["column"] == column and row["training_seed"] == training_seed
    }


def fingerprint(base: Scored) -> str:
    """A hash of the base's scores: it identifies the conditions of an evaluation.

    Every evaluation scores the base. Its scores change with prompts, seeds, samplers, metrics, base model or code.
    """
    lines = [repr((image, sorted(scores.items()))) for image, scores in sorted(base.items())]
    return text_digest("\n".join(lines))
