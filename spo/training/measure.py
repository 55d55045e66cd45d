"""Quantities of the prepared pictures, e.g. latents or a metric's scores, kept in files under .cache/latents.

Encoding a large data set takes hours. Each file has the quantities of PAIRS_IN_A_FILE pairs and is written as soon as
they are known, so a killed run continues after its last file. With several processes, each one makes its share.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from spo.data.buckets import Size, nearest_bucket
from spo.data.images import decode_image, picture_size
from spo.data.preferences import Captions, PreferencePairs
from spo.data.prefetch import WORKERS, ahead
from spo.errors import DataError
from spo.runtime import distributed
from spo.runtime.progress import Progress
from spo.runtime.shards import Sharded, Shards

PAIRS_IN_A_FILE = 1024
PAIRS_AT_A_TIME, PICTURES_AT_A_TIME = 8, 64  # read by a thread, measured at once
BUCKET, MEMBERS = "bucket", "members"  # names in a file beside those of the buckets

Quantity: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]  # of images (n, 3, H, W) and their captions, on the CPU


@dataclass(frozen=True)
class Measured:
    """A quantity of the pictures of n pairs."""

    pictures: Mapping[int, Sharded]  # by bucket: (m, ...)
    bucket: Tensor  # (n,) int
    members: Tensor  # (n, 2) int: the pictures of each pair, of its bucket

    def of_pairs(self) -> Tensor:
        """The quantity (n, 2, ...) of the two pictures of each pair; its shape must be the same in all buckets."""
        shape = next(iter(self.pictures.values())).shape[1:]
        found = torch.empty(*self.members.shape, *shape)
        for bucket, values in self.pictures.items():
            own = self.bucket == bucket
            found[own] = values[self.members[own]]
        return found

    @classmethod
    def read(cls, shards: Shards, order: Tensor) -> "Measured":
        """From the files of one folder, where the quantity stays; order (n,): each pair's position, as in the files."""
        parts: dict[int, list[Tensor]] = defaultdict(list)
        counts: Counter[int] = Counter()
        buckets, members = [], []
        for file in shards.read():
            bucket = file.pop(BUCKET)
            buckets.append(bucket)
            members.append(file.pop(MEMBERS) + torch.tensor([counts[each] for each in bucket.tolist()]).unsqueeze(1))
            for name, values in file.items():
                parts[int(name)].append(values)
                counts[int(name)] += len(values)
        pictures = {bucket: Sharded(tensors) for bucket, tensors in parts.items()}
        position = order.argsort()
        return cls(pictures, torch.cat(buckets)[position], torch.cat(members)[position])


def measure(
    stored: PreferencePairs,
    rows: Tensor,
    quantities: Mapping[Path, Callable[[], Quantity]],
    *,
    sizes: Sequence[Size],
    device: torch.device,
    label: str,
) -> dict[Path, Measured]:
    """Each quantity of the pictures of the pairs at `rows` (n,), by the folder where it is kept.

    A quantity's function is made only if some of its files are missing. The pictures of a pair get the size among
    `sizes`, height and width, that is nearest to their aspect. The pairs of a caption lie in one file or in neighbours.
    In each file a picture of a caption is decoded and measured once, however many pairs it is in. DataError if a
    process cannot read what another one wrote.
    """
    order = [part.sort().values for part in by_first(stored.captions.take(rows.numpy())).split(PAIRS_IN_A_FILE)]
    parts = [rows[positions] for positions in order]
    shards = {folder: Shards(folder, len(parts)) for folder in quantities}
    found_missing = {folder: each.missing() for folder, each in shards.items()} if distributed.is_main() else {}
    missing = distributed.gather_objects(found_missing)[0]
    functions = {folder: quantities[folder]() for folder, numbers in missing.items() if numbers}
    to_do = sorted({number for numbers in missing.values() for number in numbers})
    if 0 < len(to_do) < len(parts) and distributed.is_main():
        done = len(rows) - sum(len(parts[number]) for number in to_do)
        print(f"{label}: continues after {done:,} of {len(rows):,} pairs", file=sys.stderr, flush=True)
    own = to_do[distributed.rank() :: distributed.count()]
    if own:
        with Progress[None](total=sum(len(parts[number]) for number in own), label=label) as bar:
            for number in own:
                wanted = {folder: function for folder, function in functions.items() if number in missing[folder]}
                made = _measure_part(stored, parts[number], wanted, bar.update, sizes=sizes, device=device)
                for folder, tensors in made.items():
                    shards[folder].keep(number, tensors)
    distributed.wait()
    try:
        found = {folder: Measured.read(each, torch.cat(order)) for folder, each in shards.items()}
    except OSError as error:
        raise DataError(f"{error}; all processes need the same folder {next(iter(shards)).parent}") from None
    if distributed.is_main():
        for each in shards.values():
            each.mark_checked()
    return found


def by_first(captions: Captions) -> Tensor:
    """Positions (n,) of the captions, equal ones together, in the order in which they first appear."""
    return torch.from_numpy(captions.codes().argsort(kind="stable"))


def _measure_part(
    stored: PreferencePairs,
    rows: Tensor,
    functions: Mapping[Path, Quantity],
    count_pair: Callable[[], None],
    *,
    sizes: Sequence[Size],
    device: torch.device,
) -> dict[Path, dict[str, Tensor]]:
    """The content of one file of each quantity."""
    places: dict[tuple[int, str, bytes], int] = {}  # of a picture in its bucket
    counts: Counter[int] = Counter()
    buckets: list[int] = []
    members: list[list[int]] = []

    def new_pictures(part: Tensor) -> list[tuple[int, str, bytes]]:
        """Buckets, captions and files of the pictures that appear for the first time."""
        new = []
        for row in part.tolist():
            pair = stored[row]
            images = (pair.image_0, pair.image_1)
            bucket = nearest_bucket(sizes, [picture_size(image) for image in images]) if len(sizes) > 1 else 0
            keys = [(bucket, pair.caption, blake2b(image).digest()) for image in images]
            for key, image in zip(keys, images, strict=True):
                if key not in places:
                    places[key] = counts[bucket]
                    counts[bucket] += 1
                    new.append((bucket, pair.caption, image))
            buckets.append(bucket)
            members.append([places[key] for key in keys])
        return new

    def read(pictures: list[tuple[int, str, bytes]]) -> list[tuple[int, str, Tensor]]:
        return [(bucket, caption, _pixels(image, sizes[bucket])) for bucket, caption, image in pictures]

    waiting: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    measured: dict[Path, dict[int, list[Tensor]]] = {folder: defaultdict(list) for folder in functions}

    def measure_waiting(bucket: int) -> None:
        captions, pixels = zip(*waiting.pop(bucket), strict=True)
        images = torch.stack(pixels)
        images = images.pin_memory() if device.type == "cuda" else images
        images = images.to(device, non_blocking=True).float() / 255
        for folder, function in functions.items():
            measured[folder][bucket].append(function(images, captions))

    batches = rows.split(PAIRS_AT_A_TIME)
    for batch, pictures in zip(batches, ahead(read, map(new_pictures, batches), depth=WORKERS), strict=True):
        for bucket, caption, pixels in pictures:
            waiting[bucket].append((caption, pixels))
            if len(waiting[bucket]) == PICTURES_AT_A_TIME:
                measure_waiting(bucket)
        for _ in batch:
            count_pair()
    for bucket in list(waiting):
        measure_waiting(bucket)
    pairs = {BUCKET: torch.tensor(buckets), MEMBERS: torch.tensor(members)}
    return {
        folder: {**pairs, **{str(bucket): torch.cat(tensors) for bucket, tensors in values.items()}}
        for folder, values in measured.items()
    }


def _pixels(data: bytes, size: Size) -> Tensor:
    """Decoded image (3, *size), uint8: resized until it covers the size, the rest cropped."""
    image = ImageOps.fit(decode_image(data), size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
