"""Sizes of about one area, so that pictures keep their aspect (SDXL, arXiv 2307.01952, section 2.3).

A picture goes to the bucket whose aspect is nearest to its own; little of it is then cropped.
"""

import math
from collections.abc import Sequence

WIDEST = 4.0  # aspect of the longest size, as SDXL's

Size = tuple[int, int]  # height and width, in pixels


def bucket_sizes(size: Size, step: int | None) -> list[Size]:
    """`size`, and all others of at most its area, as large as they can be, whose sides are multiples of `step`.

    None: only `size`.
    """
    sizes = [size]
    if step is not None:
        area = math.prod(size)
        for short in range(step, math.isqrt(area) + 1, step):
            long = area // short // step * step
            if long <= WIDEST * short:
                sizes += [each for each in ((short, long), (long, short)) if each not in sizes]
    return sizes


def nearest_bucket(sizes: Sequence[Size], pictures: Sequence[Size]) -> int:
    """The index of the size whose aspect is nearest to that of pictures, which get one size."""
    aspect = sum(math.log(height / width) for height, width in pictures) / len(pictures)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][0] / sizes[i][1]) - aspect))
