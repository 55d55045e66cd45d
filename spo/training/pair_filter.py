"""Which pairs a preference model trains on: those on which independent metrics agree with the label.

LPO (arXiv 2502.01051, section 4.1) keeps a decided pair of Pick-a-Pic if the winner's gap in LAION's aesthetic score is
above -.5 and its gaps in CLIPScore and VQAScore are above 0: 168,539 of 511,840 pairs.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from spo.config import Config, PairFilter
from spo.core.types import LabelledPairs
from spo.data.buckets import bucket_sizes
from spo.data.preferences import Captions, PreferencePairs
from spo.errors import DataError
from spo.metrics.metric import build_metrics, score
from spo.preference.labels import prompt_weights
from spo.runtime import distributed
from spo.runtime.hashing import fingerprints
from spo.training.measure import Quantity, measure
from spo.training.pairs import kept_in


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
    keep_pair = consistent(pairs.label, _gaps(path, settings, config, device, cache=cache), settings)
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
    rows = keep_pair.nonzero().flatten()
    captions = Captions.of(pairs.captions).take(rows.numpy())
    kept = {name: getattr(pairs, name)[rows] for name in ("bucket", "members", "label")}
    return replace(pairs, **kept, weight=prompt_weights(captions), captions=captions), counts


def _gaps(path: Path, settings: PairFilter, config: Config, device: torch.device, *, cache: Path) -> dict[str, Tensor]:
    """For each score that the filter names, that of image 0 less that of image 1 (n,); the scores are kept."""
    models = fingerprints({source: source for metric in settings.metrics for source in metric.sources})
    metrics_settings = [metric.model_dump(mode="json") for metric in settings.metrics]
    names = sorted({*settings.gaps, *settings.ties})
    folder = kept_in(cache, path, config, what="metrics", of=[metrics_settings, models, names])

    def scoring() -> Quantity:
        metrics = build_metrics(settings.metrics, device, needed=names)

        def scores(images: Tensor, captions: Sequence[str]) -> Tensor:
            found = score(metrics, images, captions)
            return torch.stack([found[name].float() for name in names], dim=1)  # (n, scores)

        return scores

    stored, label = PreferencePairs(path), f"filter {path.stem} pairs"
    sizes, rows = bucket_sizes(config.model.size, config.model.bucket_step), torch.arange(len(stored))
    found = measure(stored, rows, {folder: scoring}, sizes=sizes, device=device, label=label)
    both = found[folder].of_pairs()  # (n, 2, scores)
    return {name: both[:, 0, i] - both[:, 1, i] for i, name in enumerate(names)}
