"""The pictures of the report, inside the page: each prompt with the same seed in every column.

Of a method's training seeds, the first one's pictures are shown.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from spo.errors import DataError
from spo.report.inputs import Row

LARGEST, LARGEST_SHEET = 384, 1600  # pixels; larger pictures are shown smaller, so that the page stays light


@dataclass(frozen=True)
class Picture:
    column: str
    data: str  # a data URI
    width: int
    height: int
    score: float | None


@dataclass(frozen=True)
class Card:
    prompt: str
    sampler: str
    pictures: list[Picture]  # in the order of the columns
    gain: float | None = None  # of the first method over the base


def gallery(
    images: Path,
    scores: Sequence[Row],
    columns: Sequence[str],
    *,
    sampler: str,
    metric: str,
    limit: int = 48,
    extremes: int = 8,
) -> list[Card]:
    """Cards of `limit` prompts that have pictures; DataError if one is missing or broken.

    columns: the base, then the methods. With more prompts than that, the `extremes` largest gains and losses of the
    first method are among the cards, and the first prompts are the rest.
    """
    prompts, places = first_pictures(scores, sampler)
    score: dict[tuple[str, int], float] = {}
    for row in scores:
        if row["sampler"] == sampler and row["image_index"] == 0 and metric in row:
            score.setdefault((row["column"], int(row["prompt_index"])), row[metric])
    shown = [column for column in columns if column in places]
    gains = {
        index: score[shown[1], index] - score[shown[0], index]
        for index in prompts
        if len(shown) > 1 and {(shown[0], index), (shown[1], index)} <= score.keys()
    }
    return [
        Card(
            prompts[index],
            sampler,
            [picture(images / places[name] / f"{index:04d}-0.png", name, score.get((name, index))) for name in shown],
            gains.get(index),
        )
        for index in chosen(sorted(prompts), gains, limit=limit, extremes=extremes)
    ]


def chosen(prompts: Sequence[int], gains: Mapping[int, float], *, limit: int, extremes: int) -> list[int]:
    """`limit` of the prompts in their order, with those of the largest gains and losses."""
    if len(prompts) <= limit:
        return list(prompts)
    ranked = sorted(gains, key=lambda index: gains[index])
    kept = {*ranked[:extremes], *ranked[len(ranked) - extremes :]} if ranked else set()
    for index in prompts:
        if len(kept) == limit:
            break
        kept.add(index)
    return sorted(kept)


def first_pictures(scores: Sequence[Row], sampler: str) -> tuple[dict[int, str], dict[str, str]]:
    """The prompts by their index, and for each column the folder of its first training seed's pictures."""
    prompts: dict[int, str] = {}
    places: dict[str, str] = {}
    for row in scores:
        if row["sampler"] == sampler and row["image_index"] == 0:
            column, seed = row["column"], row["training_seed"]
            prompts.setdefault(int(row["prompt_index"]), row["prompt"])
            places.setdefault(column, column if math.isnan(seed) else f"{column}/seed-{seed:.0f}")
    return prompts, places


def picture(path: Path, column: str, score: float | None = None, *, largest: int = LARGEST) -> Picture:
    """A picture as a data URI: the file if no side is above `largest` pixels, else a smaller JPEG."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG" and max(image.size) <= largest:
                image.verify()
                width, height, kind = *image.size, "png"
            else:
                small = image.convert("RGB")
                small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=88)
                data, width, height, kind = buffer.getvalue(), *small.size, "jpeg"
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run `python -m spo evaluate` again") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} is no readable picture ({error}); run `python -m spo evaluate` again") from None
    return Picture(column, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height, score)
