"""Check raw prompts and preference pairs, and split them so that no prompt is on two sides.

Reads the sources in `config.prepare`; writes runs/<profile>/prepare/ in one step:
prompts/{train,validation,test}.txt, preferences/{train,validation}.parquet, rejected.jsonl and metrics.json.

Without pairs (for a preference model that is already trained) preferences/ stays empty. A pair whose caption is a
validation or test prompt goes to validation, one whose caption is a training prompt to training; other captions are
split by the same hash of caption and seed.

The metrics count the prompts that the model's text encoders will cut, with examples.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from spo.config import Config
from spo.data.preferences import PairWriter, read_preferences
from spo.data.prompt_lengths import cut_prompts
from spo.data.prompts import Split, prompt_hash, read_prompts, split_of
from spo.data.rows import Rejected, count_reasons
from spo.errors import DataError, ModelError
from spo.runtime.files import atomic_path, write_json, write_text
from spo.runtime.progress import progress
from spo.tracking import Tracker
from spo.workspace import Prepared, Workspace


def run(config: Config, *, root: Path = Path(), tracker: Tracker) -> dict[str, Any]:
    """Run the stage below `root`; its metrics. DataError if a source cannot be read or yields nothing for a side."""
    start = time.perf_counter()
    with atomic_path(Workspace(config, root).prepared.folder) as folder:
        folder.mkdir(parents=True)
        with (folder / "rejected.jsonl").open("w", encoding="utf-8", newline="\n") as log:
            split, prompt_counts = _prepare_prompts(config, root, folder, log)
            pair_counts = _prepare_preferences(config, root, folder, log, split)
        seconds = round(time.perf_counter() - start, 1)
        metrics = {"prompts": prompt_counts, "preferences": pair_counts, "seconds": seconds}
        write_json(folder / "metrics.json", metrics)
    tracker.log_metrics(metrics)
    return metrics


def _prepare_prompts(config: Config, root: Path, folder: Path, log: TextIO) -> tuple[Split, dict[str, Any]]:
    source = config.prepare.prompts
    prompts, rejected = read_prompts(root / source.source, field=source.field, max_prompts=source.max_prompts)
    split = split_of(prompts, config)
    for setting, detail in split.shortfalls(config).items():
        print(f"warning: {setting}: {detail}", file=sys.stderr, flush=True)
    sides = asdict(split)
    for side, of_side in sides.items():
        write_text(Prepared(folder).prompts_file(side), "".join(f"{prompt}\n" for prompt in of_side))
    for item in rejected:
        _write_line(log, item)
    counts = {
        "read": len(prompts) + len(rejected),
        "kept": len(prompts),
        "duplicates": sum(item.reason == "duplicate" for item in rejected),
        "rejected": count_reasons(rejected),
        **{side: len(of_side) for side, of_side in sides.items()},
        "cut": _cut(prompts, config),
    }
    return split, counts


def _cut(prompts: list[str], config: Config, *, what: str = "prompts") -> dict[str, Any]:
    """The prompts that the text encoders will cut; empty, with a warning, where their tokenizers are not here."""
    try:
        found = cut_prompts(prompts, config.model)
    except ModelError as error:
        print(f"warning: it is not known which {what} are too long: {error}", file=sys.stderr, flush=True)
        return {}
    for name, about in found.items():
        if about["prompts"]:
            told = f"{about['prompts']} of {len(prompts)} {what} are longer than the {about['context']} tokens"
            print(f"warning: {told} of the {name} and are cut: {about['examples'][0]!r}", file=sys.stderr, flush=True)
    return found


def _prepare_preferences(config: Config, root: Path, folder: Path, log: TextIO, split: Split) -> dict[str, Any]:
    source = config.prepare.preferences
    (folder / "preferences").mkdir()
    if source is None:
        return {"read": 0, "kept": 0}
    train, held_out = (
        frozenset(prompt.lower() for prompt in side) for side in (split.train, (*split.validation, *split.test))
    )
    reasons: Counter[str] = Counter()
    captions: set[str] = set()
    read = kept = ties = 0
    with (
        PairWriter(Prepared(folder).pairs_file("train")) as to_train,
        PairWriter(Prepared(folder).pairs_file("validation")) as to_validation,
    ):
        for item in progress(read_preferences(source.source, root=root, split=source.split), label="preference pairs"):
            if isinstance(item, Rejected):
                read += item.row is not None  # None: a whole file was rejected
                reasons[item.reason] += 1
                _write_line(log, item)
                continue
            by_hash = prompt_hash(item.caption, config.seed) < config.prepare.validation_fraction
            caption = item.caption.lower()
            held = caption in held_out or (caption not in train and by_hash)
            (to_validation if held else to_train).write(item)
            captions.add(item.caption)
            read += 1
            kept += 1
            ties += item.is_tie
            if kept == source.max_pairs:
                break
    for side, writer in (("training", to_train), ("validation", to_validation)):
        if not writer.count:
            raise DataError(
                f"{source.source}: of {kept} usable preference pairs with {len(captions)} captions none falls to "
                f"{side}; give pairs of more captions, or change prepare.validation_fraction"
            )
    return {
        "read": read,
        "kept": kept,
        "ties": ties,
        "rejected": dict(reasons.most_common()),
        "captions": len(captions),
        "cut": _cut(sorted(captions), config, what="captions"),
        "train": to_train.count,
        "validation": to_validation.count,
    }


def _write_line(log: TextIO, item: Rejected) -> None:
    log.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
