"""When a new LoRA takes the champion's place: the rule, as a function of scores alone.

Candidate and rival are scored on the same prompts and seeds under the same samplers. The candidate is promoted iff

    primary   its gain under the deciding sampler has a 95% interval wholly above zero, and
    guarded   its change of each guarded score, under every sampler, has a 95% interval wholly above -tolerance
              (a non-inferiority test: what the figures leave possible is what counts, not only their mean).

Intervals are the paired bootstrap's over prompts (see statistics.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spo.evaluation.statistics import Difference, paired_difference
from spo.runtime.hashing import text_digest

Image = tuple[float, int, int, str]  # eta, prompt_index, image_index, prompt
Scored = Mapping[Image, Mapping[str, float]]


@dataclass(frozen=True)
class Check:
    """One requirement, what was measured, and whether that meets it."""

    metric: str
    eta: float
    found: Difference
    above: float  # where the whole interval must lie

    @property
    def passed(self) -> bool:
        return self.found.low > self.above

    @property
    def words(self) -> str:
        found = self.found
        interval = f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        verb = "lies" if self.passed else "does not lie"
        return f"{self.metric} at eta {self.eta:g}: {interval} {verb} above {self.above:g}"


@dataclass(frozen=True)
class Decision:
    """Whether the candidate takes the place, and every reason."""

    promoted: bool
    rival: str
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> list[str]:
        """A line a requirement, those that failed first."""
        return [check.words for check in sorted(self.checks, key=lambda check: check.passed)]

    @property
    def words(self) -> str:
        """The decision in a sentence."""
        if self.promoted:
            return f"promoted: it beats {self.rival} in {self.checks[0].metric} and falls in no guarded score"
        failed = " and ".join(dict.fromkeys(check.metric for check in self.checks if not check.passed))
        return f"not promoted: against {self.rival} its interval of {failed} is not where it has to be"


def decide(
    candidate: Scored,
    rival: Scored,
    *,
    name: str,
    primary: str,
    tolerances: Mapping[str, float],
    deciding_eta: float,
    samples: int = 10_000,
) -> Decision:
    """Hold the candidate's scores against the rival's of the same images.

    Args:
        candidate, rival: scores of each image.
        name: of the rival, in words.
        primary: the score that has to rise.
        tolerances: of each guarded score, how far its interval may reach below zero, in that score's units.
        deciding_eta: the sampler under which the primary score decides.

    Raises:
        ValueError: the two were not scored on the same images.
    """
    if candidate.keys() != rival.keys():
        raise ValueError(f"candidate and rival share {len(candidate.keys() & rival.keys())} images, not all of theirs")

    def check(metric: str, eta: float, above: float) -> Check:
        images = [image for image in candidate if image[0] == eta]
        a, b = ([scores[image][metric] for image in images] for scores in (candidate, rival))
        return Check(metric, eta, paired_difference(a, b, [image[3] for image in images], samples=samples), above)

    etas = dict.fromkeys(image[0] for image in candidate)
    checks = [check(primary, deciding_eta, 0.0)]
    checks += [check(metric, eta, -tolerance) for metric, tolerance in tolerances.items() for eta in etas]
    return Decision(all(each.passed for each in checks), name, tuple(checks))


def scored(rows: Sequence[Mapping[str, str]], column: str, training_seed: str = "") -> Scored:
    """One column's scores, of the rows of an evaluation's scores.csv."""
    named = ("column", "training_seed", "eta", "prompt_index", "image_index", "prompt")
    return {
        (float(row["eta"]), int(row["prompt_index"]), int(row["image_index"]), row["prompt"]): {
            name: float(value) for name, value in row.items() if name not in named
        }
        for row in rows
        if row["column"] == column and row["training_seed"] == training_seed
    }


def fingerprint(base: Scored) -> str:
    """What tells one evaluation's conditions from another's.

    The base is scored in each: its scores of the same images differ as soon as prompts, seeds, sampler, metrics, base
    model or code do.
    """
    lines = [repr((image, sorted(scores.items()))) for image, scores in sorted(base.items())]
    return text_digest("\n".join(lines))
