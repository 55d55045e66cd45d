"""The pictures of the report, inside the page: each prompt with the same seed in every column.

Of a method's training seeds, the first one's pictures are shown.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from spo.errors import DataError
from spo.report.inputs import Row

LARGEST = 384  # pixels; larger pictures are shown smaller, so that the page stays light


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
    pictures: list[Picture]  # in the order of the columns


def gallery(
    images: Path, scores: Sequence[Row], columns: Sequence[str], *, sampler: str, metric: str, limit: int = 48
) -> list[Card]:
    """The first `limit` prompts; DataError if a picture is missing or broken."""
    prompts, places = first_pictures(scores, sampler)
    score: dict[tuple[str, int], float] = {}
    for row in scores:
        if row["sampler"] == sampler and row["image_index"] == 0 and metric in row:
            score.setdefault((row["column"], int(row["prompt_index"])), row[metric])
    shown = [column for column in columns if column in places]
    return [
        Card(
            prompts[index],
            [picture(images / places[name] / f"{index:04d}-0.png", name, score.get((name, index))) for name in shown],
        )
        for index in sorted(prompts)[:limit]
    ]


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


def picture(path: Path, column: str, score: float | None) -> Picture:
    """A picture as a data URI: the file if it is small, else a smaller JPEG."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG" and max(image.size) <= LARGEST:
                image.verify()
                width, height, kind = *image.size, "png"
            else:
                small = image.convert("RGB")
                small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=88)
                data, width, height, kind = buffer.getvalue(), *small.size, "jpeg"
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run `python -m spo evaluate` again") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} is no readable picture ({error}); run `python -m spo evaluate` again") from None
    return Picture(column, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height, score)
