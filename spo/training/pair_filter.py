"""Which pairs a preference model trains on: those on which independent metrics agree with the label.

LPO (arXiv 2502.01051, section 4.1) keeps a decided pair of Pick-a-Pic if the winner's gap in LAION's aesthetic score is
above -.5 and its gaps in CLIPScore and VQAScore are above 0: 168,539 of 511,840 pairs.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spo.config import Config, PairFilter
from spo.core.types import LabelledPairs
from spo.data.preferences import PreferencePairs
from spo.errors import DataError
from spo.metrics.metric import build_metrics, score
from spo.preference.labels import prompt_weights
from spo.runtime import distributed
from spo.runtime.cache import keep, kept
from spo.runtime.hashing import fingerprints, json_hash
from spo.training.pairs import fingerprint_of_pairs, measure


def consistent(label: Tensor, gaps: Mapping[str, Tensor], settings: PairFilter) -> Tensor:
    """The pairs to keep (n,), bool.

    label: (n, 2). gaps: for each score, that of image 0 less that of image 1 (n,).
    """
    sign = (label[:, 0] - label[:, 1]).sign()
    decided = torch.stack([sign * gaps[name] > least for name, least in settings.gaps.items()]).all(dim=0)
    tied = torch.ones_like(decided)
    for name, most in settings.ties.items():
        tied &= gaps[name].abs() <= most
    return torch.where(sign == 0, tied, decided)


def filter_pairs(
    pairs: LabelledPairs, path: Path, settings: PairFilter, config: Config, device: torch.device, *, cache: Path
) -> tuple[LabelledPairs, dict[str, int]]:
    """The pairs of the file `path` that pass the filter, and counts of decided and tied pairs before and after.

    DataError if no decided pair passes.
    """
    keep_pair = consistent(pairs.label, _gaps(path, len(pairs), settings, config, device, cache=cache), settings)
    decided = pairs.label[:, 0] != pairs.label[:, 1]
    counts = {
        "decided": int(decided.sum()),
        "decided_kept": int((decided & keep_pair).sum()),
        "ties": int((~decided).sum()),
        "ties_kept": int((~decided & keep_pair).sum()),
    }
    if distributed.is_main():
        text = "filter: keeps {decided_kept:,} of {decided:,} decided pairs and {ties_kept:,} of {ties:,} ties"
        print(text.format(**counts), file=sys.stderr, flush=True)
    if not counts["decided_kept"]:
        raise DataError(f"{path}: no decided pair passes the filter with gaps {settings.gaps}; lower the gaps")
    captions = [caption for caption, kept_ in zip(pairs.captions, keep_pair.tolist(), strict=True) if kept_]
    members, label = pairs.members[keep_pair], pairs.label[keep_pair]
    return LabelledPairs(pairs.pictures, members, label, prompt_weights(captions), captions), counts


def _gaps(
    path: Path, num_pairs: int, settings: PairFilter, config: Config, device: torch.device, *, cache: Path
) -> dict[str, Tensor]:
    """For each score that the filter names, that of image 0 less that of image 1 (n,); cached."""
    models = fingerprints({source: source for metric in settings.metrics for source in metric.sources})
    metrics_settings = [metric.model_dump(mode="json") for metric in settings.metrics]
    names = sorted({*settings.gaps, *settings.ties})
    key = json_hash([fingerprint_of_pairs(path), num_pairs, config.model.size, metrics_settings, models, names])
    file = cache / f"{path.stem}-gaps-{key}.safetensors"
    if distributed.gather_objects(file.exists())[0] and (cached := kept(file)) is not None:
        return cached
    metrics = build_metrics(settings.metrics, device, needed=names)

    def scores(images: Tensor, captions: Sequence[str]) -> Tensor:
        found = score(metrics, images, captions)
        return torch.stack([found[name].float() for name in names], dim=1)  # (n, scores)

    stored, label = PreferencePairs(path), f"filter {path.stem} pairs"
    measured, members = measure(
        stored, num_pairs, {"score": scores}, size=config.model.size, device=device, label=label
    )
    both = measured["score"][members]  # (n, 2, scores)
    made = {name: both[:, 0, i] - both[:, 1, i] for i, name in enumerate(names)}
    if distributed.is_main():
        keep(file, made)
    return made
