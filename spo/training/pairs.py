"""The latents and labels of the prepared pairs, cached under .cache/latents.

Encoding a large data set takes hours, and `train_preference`, every training of Diffusion-DPO and every resumed run
need the same latents. A file's name has a hash of all that its content depends on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from spo.config import Config, LabelsConfig
from spo.core.types import LabelledPairs
from spo.data.images import decode_image
from spo.data.preferences import PreferencePairs
from spo.data.prefetch import ahead
from spo.errors import DataError
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.checkpoint import load_clip
from spo.preference.labels import human_labels, prompt_weights, pseudo_labels
from spo.preference.score import PreferenceScorer
from spo.runtime import distributed
from spo.runtime.cache import keep, kept
from spo.runtime.hashing import fingerprint, fingerprints, json_hash, short_hash, tensor_hash
from spo.runtime.progress import progress

PAIRS_AT_A_TIME, PICTURES_AT_A_TIME = 32, 64
Quantity: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]  # of images (n, 3, H, W) and their captions

VERSION = 4  # of the cached content; raise it if the same inputs give other latents or labels


def load_pairs(
    path: Path,
    base: LatentDiffusion,
    config: Config,
    labels: LabelsConfig | None = None,
    *,
    cache: Path,
    limit: int | None = None,
) -> LabelledPairs:
    """`limit` of the prepared pairs, spread over the file, with encoded images and labels, by people or by a model.

    labels: None: the profile's. Latents and a model's labels come from the folder `cache` or are made and stored there;
    new latents replace those of other pairs or settings, with their labels.
    Raises DataError if all pairs are ties, because then there is nothing to learn or to measure.
    """
    stored, labels = PreferencePairs(path), labels or config.labels
    num_pairs = min(len(stored), limit or len(stored))
    pairs = [fingerprint_of_pairs(path), num_pairs]
    files = {"pictures": cache / f"{path.stem}-latents-{_latents_key(pairs, base, config)}.safetensors"}
    if labels.model:
        files["score"] = cache / f"{path.stem}-scores-{_scores_key(pairs, labels, config)}.safetensors"
    there = distributed.gather_objects([name for name, file in files.items() if file.exists()])[0]
    found = {name: tensors for name in there if (tensors := kept(files[name])) is not None}
    quantities: dict[str, Quantity] = {}
    if "pictures" not in found:
        quantities["pictures"] = lambda images, _: base.autoencoder.encode(images).cpu()
    if labels.model and "score" not in found:
        labeller = PreferenceScorer(load_clip(labels.model, processor=labels.processor), device=base.device)
        quantities["score"] = partial(_score, labeller=labeller)
    if quantities:
        options: dict[str, Any] = {"size": config.model.size, "device": base.device}
        made, members = measure(stored, num_pairs, quantities, **options, label=f"encode {path.stem} pairs")
        found |= {name: {name: tensor, "members": members} for name, tensor in made.items()}
        if distributed.is_main():
            for name in made:
                keep(files[name], found[name])
            for other in cache.glob(f"{path.stem}-*.safetensors") if "pictures" in made else ():
                if other not in files.values():
                    other.unlink(missing_ok=True)
    rows = spread(len(stored), num_pairs).tolist()
    if labels.model:
        scores = found["score"]["score"][found["score"]["members"]]  # (n, 2)
        label = pseudo_labels(scores, tie_margin=labels.tie_margin)
    else:
        label = human_labels(torch.tensor([stored.labels[row] for row in rows]))
    captions = [stored.captions[row] for row in rows]
    result = LabelledPairs(**found["pictures"], label=label, weight=prompt_weights(captions), captions=captions)
    if not (result.label[:, 0] != result.label[:, 1]).any():
        raise DataError(f"{path}: all {len(result)} pairs are ties; some pairs must have a winner")
    return result


def spread(total: int, num: int) -> Tensor:
    """`num` rows of `total` (num,), evenly spread, so that a part of a file has captions from all of it."""
    return torch.arange(num) * total // num


def _latents_key(pairs: list[Any], base: LatentDiffusion, config: Config) -> str:
    """A hash of everything that latents depend on."""
    vae = base.autoencoder.vae
    weights = [tensor_hash(vae.state_dict()), vae.config.scaling_factor, vae.config.shift_factor]
    return json_hash([VERSION, pairs, config.model.resolution, weights])


def _scores_key(pairs: list[Any], labels: LabelsConfig, config: Config) -> str:
    """A hash of everything that a model's scores depend on."""
    models = fingerprints({"labels": labels.model, "processor": labels.processor})
    return json_hash([VERSION, pairs, config.model.resolution, models])


def fingerprint_of_pairs(path: Path) -> str:
    """A fingerprint of every caption and label and, in big files, of a part of the images."""
    stored = PreferencePairs(path)
    read = json.dumps([stored.captions, stored.labels])
    return f"{fingerprint(path)} {short_hash(read)}"


def _score(images: Tensor, captions: Sequence[str], labeller: PreferenceScorer) -> Tensor:
    """A clean-image model's scores (n,) of images (n, 3, H, W)."""
    return labeller.score_images(images, labeller.encode(captions), torch.zeros(len(images), dtype=torch.long)).cpu()


def measure(
    stored: PreferencePairs,
    num_pairs: int,
    quantities: Mapping[str, Quantity],
    *,
    size: tuple[int, int],
    device: torch.device,
    label: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """Each quantity (m, ...) of the pictures of `num_pairs` pairs, at `size`, height and width; and members (n, 2).

    The pairs are spread over the file. `members` are the two pictures of each pair. A picture of one caption is decoded
    and measured once, however many pairs it is in. Each process takes its share of the pairs, and all get everything.
    """
    rows = spread(len(stored), num_pairs)
    is_shared = num_pairs >= distributed.count()
    parts = rows[distributed.share(num_pairs) if is_shared else slice(None)].split(PAIRS_AT_A_TIME)
    index: dict[tuple[str, bytes], int] = {}  # of the pictures, by caption and hash
    members: list[tuple[int, int]] = []

    def new_pictures(part: Tensor) -> list[tuple[str, bytes]]:
        """The captions and files of the pictures that appear for the first time."""
        new = []
        for row in part.tolist():
            pair = stored[row]
            keys = [(pair.caption, blake2b(image).digest()) for image in (pair.image_0, pair.image_1)]
            for key, image in zip(keys, (pair.image_0, pair.image_1), strict=True):
                if key not in index:
                    index[key] = len(index)
                    new.append((pair.caption, image))
            members.append((index[keys[0]], index[keys[1]]))
        return new

    def read(pictures: list[tuple[str, bytes]]) -> tuple[list[str], list[Tensor]]:
        return [caption for caption, _ in pictures], [_pixels(image, size) for _, image in pictures]

    measured: dict[str, list[Tensor]] = {name: [] for name in quantities}
    captions: list[str] = []
    pixels: list[Tensor] = []
    decoded = ahead(read, (new_pictures(part) for part in parts), depth=2)
    for number, (some_captions, some_pixels) in enumerate(progress(decoded, total=len(parts), label=label), start=1):
        captions += some_captions
        pixels += some_pixels
        while len(pixels) >= PICTURES_AT_A_TIME or (pixels and number == len(parts)):
            images = torch.stack(pixels[:PICTURES_AT_A_TIME])
            images = images.pin_memory() if device.type == "cuda" else images
            images = images.to(device, non_blocking=True).float() / 255
            for name, quantity in quantities.items():
                measured[name].append(quantity(images, captions[:PICTURES_AT_A_TIME]))
            del captions[:PICTURES_AT_A_TIME], pixels[:PICTURES_AT_A_TIME]
    made, found = {name: torch.cat(tensors) for name, tensors in measured.items()}, torch.tensor(members)
    if not is_shared:
        return made, found
    before = sum(distributed.gather_objects(len(index))[: distributed.rank()])
    return {name: distributed.gather(tensor) for name, tensor in made.items()}, distributed.gather(found + before)


def _pixels(data: bytes, size: tuple[int, int]) -> Tensor:
    """Decoded image (3, *size), uint8: resized until it covers the size, the rest cropped."""
    image = ImageOps.fit(decode_image(data), size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
