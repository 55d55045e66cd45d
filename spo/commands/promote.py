"""Register the evaluated LoRA as a version of the registered model; make it champion if it passes the rule.

The candidate is the LoRA that `evaluate` released for the method. It is compared with the present champion, or with the
base if there is none, on the test prompts, by the rule in spo/evaluation/promotion.py. A champion that was evaluated
under other conditions (prompts, seeds, samplers, metrics, base or code) is first evaluated anew. The version keeps the
decision and its reasons.
"""

import csv
import dataclasses
import sys
from pathlib import Path

from spo import tracking
from spo.config import Config
from spo.errors import ConfigError, DataError, ModelError, SpoError
from spo.evaluation.image_scorer import ImageScorer
from spo.evaluation.model_variants import BASE, ModelVariant, Task
from spo.evaluation.promotion import Decision, Scored, decide, fingerprint, scored
from spo.evaluation.resolve_model import lora_within
from spo.models.generate import image_seed
from spo.models.lora_file import WEIGHTS
from spo.runtime.files import read_json
from spo.tracking import registry
from spo.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An evaluated LoRA and its scores."""

    method: str
    released: str  # seed-<training seed>/step-<rollouts>
    lora: Path
    rows: list[dict[str, str]]  # of scores.csv

    @property
    def scores(self) -> Scored:
        return scored(self.rows, self.method, self.released.partition("/")[0].removeprefix("seed-"))

    @property
    def base(self) -> Scored:
        return scored(self.rows, BASE)


def run(
    config: Config, *, root: Path = Path(), method: str | None = None, against_base: bool = False
) -> Decision | None:
    """Register the candidate and decide; None if it is the champion already.

    against_base: compare with the base and ignore the champion, e.g. after a change of the base model.
    """
    candidate = find_candidate(config, root, method)
    version = register(config, candidate, root)
    present = None if against_base else registry.champion(config, root)
    if present is not None and present.tags["spo.digest"] == version.tags["spo.digest"]:
        registry.make_champion(version, root)  # the same LoRA, perhaps evaluated anew
        print(f"{version.name}: {version.description} is the champion already")
        return None
    name, rival = "the base", candidate.base
    if present is not None:
        name, rival = f"the champion, {present.description}", _scores_of(present, candidate, config, root)
    evaluate, tolerance = config.evaluate, config.promote.tolerance
    decision = decide(
        candidate.scores,
        rival,
        name=name,
        primary=evaluate.primary,
        tolerances={metric: tolerance.get(metric, evaluate.guard_tolerance) for metric in evaluate.guarded},
        deciding=evaluate.deciding,
        samples=evaluate.bootstrap_samples,
    )
    tags = {
        "promotion": "promoted" if decision.promoted else "not promoted",
        "promotion.against": decision.rival,
        "promotion.reasons": "\n".join(decision.reasons),
    }
    reasons = "\n".join(f"- {reason}" for reason in decision.reasons)
    text = f"{_description(candidate, config, root)}\n\n**{decision.description}**\n\n{reasons}"
    registry.describe(version, root, tags=tags, description=text)
    if decision.promoted:
        registry.make_champion(version, root)
    print(f"{version.name}: {version.description} {decision.description}")
    for reason in decision.reasons:
        print(f"  {reason}")
    return decision


def find_candidate(config: Config, root: Path = Path(), method: str | None = None) -> Candidate:
    """The LoRA that `evaluate` released for the method (default: promote.method, or else the profile's first)."""
    name = method or config.promote.method or config.methods[0]
    workspace = Workspace(config, root)
    folder = workspace.evaluate
    if name not in config.methods:
        raise ConfigError(f"promote: {name!r} is not among the evaluated methods; use one of {list(config.methods)}")
    if not (folder / "metrics.json").is_file():
        raise DataError(f"{folder} holds no evaluation; run `python -m spo evaluate`")
    lora = workspace.loras / name
    if not (lora / WEIGHTS).is_file():
        raise ModelError(f"{lora} holds no {WEIGHTS}: a LoRA can be registered, a fully fine-tuned model cannot")
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    metrics, deciding = read_json(folder / "metrics.json"), config.evaluate.deciding
    if metrics.get("sampler") != deciding or {row.get("sampler") for row in rows} != set(config.evaluate.samplers):
        raise DataError(f"{folder} is of other samplers than the profile's; run `python -m spo evaluate` again")
    return Candidate(name, metrics[name]["released"], lora, rows)


def register(config: Config, candidate: Candidate, root: Path = Path()) -> registry.Version:
    """Register the candidate with a description of its evaluation."""
    evaluated, reported = Workspace(config, root).evaluate, Workspace(config, root).report
    files = [evaluated / name for name in ("scores.csv", "metrics.json", "means.csv", "comparisons.csv", "samples.png")]
    files += [reported / name for name in ("report.html", "summary.txt")]
    tags = {
        "method": candidate.method,
        "released": candidate.released,
        "spo.fingerprint": fingerprint(candidate.base),
    }
    present = [file for file in files if file.is_file()]
    version = registry.register(config, candidate.lora, present, root, tags=tags)
    if "promotion" not in version.tags:
        text = _description(candidate, config, root)
        registry.describe(version, root, tags=_headline(candidate, config), description=text)
    return version


def register_released(config: Config, root: Path = Path()) -> None:
    """Register the LoRA that was just evaluated and reported; if that fails, only print a warning."""
    try:
        with tracking.store_errors(root):
            version = register(config, find_candidate(config, root), root)
        print(f"registered as {version.uri}; `python -m spo promote` decides whether it becomes champion", flush=True)
    except SpoError as error:
        print(f"warning: not registered: {error}", file=sys.stderr, flush=True)


def _scores_of(champion: registry.Version, candidate: Candidate, config: Config, root: Path) -> Scored:
    """The champion's scores of the candidate's images: the kept ones, or new ones if conditions have changed."""
    folder = tracking.fetch_model(champion.uri, root)
    if champion.tags.get("spo.fingerprint") == fingerprint(candidate.base):
        with (folder / "evaluation" / "scores.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return scored(rows, champion.tags["method"], champion.tags["released"].partition("/")[0].removeprefix("seed-"))
    print(
        f"{champion.description}, the champion, was evaluated under other conditions; it is evaluated anew", flush=True
    )
    images = list(candidate.scores)
    variant = ModelVariant("champion", checkpoint=lora_within(folder))
    image_scorer = ImageScorer(config, root)
    found = {}
    try:
        for sampler in dict.fromkeys(image[0] for image in images):
            own = [image for image in images if image[0] == sampler]
            tasks = [Task(i, j, prompt, image_seed(config.evaluate.seed, prompt, j)) for _, i, j, prompt in own]
            scores = image_scorer.scores(variant, tasks, sampler, split="test")
            for k, image in enumerate(own):
                found[image] = {name: values[k].item() for name, values in scores.items()}
    except ModelError as error:
        raise ModelError(
            f"{champion.description}, the champion, does not fit the present base: {error}; "
            "`python -m spo promote --against-base` ignores it"
        ) from None
    return found


def _headline(candidate: Candidate, config: Config) -> dict[str, str]:
    """Tags: means and differences from the base with the deciding sampler."""
    sampler = config.evaluate.deciding
    tags = {"evaluation.sampler": f"{sampler} ({config.evaluate.samplers[sampler].description})"}
    for metric in (config.evaluate.primary, *config.evaluate.guarded):
        values, base_values = (
            [scores[metric] for image, scores in of_images.items() if image[0] == sampler]
            for of_images in (candidate.scores, candidate.base)
        )
        mean, base = sum(values) / len(values), sum(base_values) / len(base_values)
        tags[f"evaluation.{metric}"] = f"{mean:.4f}"
        tags[f"evaluation.{metric}.vs_base"] = f"{mean - base:+.4f}"
    return tags


def _description(candidate: Candidate, config: Config, root: Path) -> str:
    summary = Workspace(config, root).report / "summary.txt"
    text = summary.read_text(encoding="utf-8").strip() if summary.is_file() else "There is no report yet."
    return f"{candidate.method}, {candidate.released}, profile {config.profile}\n\n```\n{text}\n```"
