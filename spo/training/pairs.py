"""The latents and labels of the prepared pairs, cached under .cache/latents.

Encoding a large data set takes hours, and `train_preference`, every training of Diffusion-DPO and every resumed run
need the same latents. A file's name has a hash of all that its content depends on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from spo.config import Config, LabelsConfig
from spo.core.types import LabelledPairs
from spo.data.images import decode_image
from spo.data.preferences import PreferencePair, PreferencePairs
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

PAIRS_AT_A_TIME = 32
Quantity: TypeAlias = Callable[[Sequence[PreferencePair], Tensor], Tensor]  # of n pairs and their images (2 n, 3, H, W)

VERSION = 3  # of the cached content; raise it if the same inputs give other latents or labels


def load_pairs(
    path: Path,
    base: LatentDiffusion,
    config: Config,
    labels: LabelsConfig | None = None,
    *,
    cache: Path,
    limit: int | None = None,
) -> LabelledPairs:
    """The first `limit` prepared pairs with encoded images and their labels, by people or by a model.

    labels: None: the profile's. Latents and a model's labels come from the folder `cache` or are made and stored there;
    new latents replace those of other pairs or settings, with their labels.
    Raises DataError if all pairs are ties, because then there is nothing to learn or to measure.
    """
    stored, labels = PreferencePairs(path), labels or config.labels
    num_pairs = min(len(stored), limit or len(stored))
    pairs = [fingerprint_of_pairs(path), num_pairs]
    files = {"latents": cache / f"{path.stem}-latents-{_latents_key(pairs, base, config)}.safetensors"}
    if labels.model:
        files["label"] = cache / f"{path.stem}-labels-{_labels_key(pairs, labels, config)}.safetensors"
    there = distributed.gather_objects([name for name, file in files.items() if file.exists()])[0]
    found = {name: tensors[name] for name in there if (tensors := kept(files[name])) is not None}
    quantities: dict[str, Quantity] = {}
    if "latents" not in found:
        quantities["latents"] = lambda _, images: base.autoencoder.encode(images).cpu().unflatten(0, (-1, 2))
    if labels.model and "label" not in found:
        labeller = PreferenceScorer(load_clip(labels.model, processor=labels.processor), device=base.device)
        quantities["label"] = partial(_label, labeller=labeller, labels=labels)
    if quantities:
        label_of_bar = f"encode {path.stem} pairs"
        made = measure(stored, num_pairs, quantities, size=config.model.size, device=base.device, label=label_of_bar)
        found |= made
        if distributed.is_main():
            for name, tensor in made.items():
                keep(files[name], {name: tensor})
            for other in cache.glob(f"{path.stem}-*.safetensors") if "latents" in made else ():
                if other not in files.values():
                    other.unlink(missing_ok=True)
    label = found["label"] if labels.model else human_labels(torch.tensor(stored.labels[:num_pairs]))
    captions = stored.captions[:num_pairs]
    result = LabelledPairs(found["latents"], label, prompt_weights(captions), captions)
    if not (result.label[:, 0] != result.label[:, 1]).any():
        raise DataError(f"{path}: all {len(result)} pairs are ties; some pairs must have a winner")
    return result


def _latents_key(pairs: list[Any], base: LatentDiffusion, config: Config) -> str:
    """A hash of everything that latents depend on."""
    vae = base.autoencoder.vae
    weights = [tensor_hash(vae.state_dict()), vae.config.scaling_factor, vae.config.shift_factor]
    return json_hash([VERSION, pairs, config.model.resolution, weights])


def _labels_key(pairs: list[Any], labels: LabelsConfig, config: Config) -> str:
    """A hash of everything that a model's labels depend on."""
    models = fingerprints({"labels": labels.model, "processor": labels.processor})
    return json_hash([VERSION, pairs, config.model.resolution, labels.model_dump(mode="json"), models])


def fingerprint_of_pairs(path: Path) -> str:
    """A fingerprint of every caption and label and, in big files, of a part of the images."""
    stored = PreferencePairs(path)
    read = json.dumps([stored.captions, stored.labels])
    return f"{fingerprint(path)} {short_hash(read)}"


def _label(pairs: Sequence[PreferencePair], images: Tensor, labeller: PreferenceScorer, labels: LabelsConfig) -> Tensor:
    """A model's labels (n, 2) of pairs with images (2 n, 3, H, W)."""
    text = labeller.encode([pair.caption for pair in pairs]).repeat_interleave(2, dim=0)
    scores = labeller.score_images(images, text, torch.zeros(len(images), dtype=torch.long)).cpu()
    return pseudo_labels(scores.unflatten(0, (-1, 2)), tie_margin=labels.tie_margin)


def measure(
    stored: PreferencePairs,
    num_pairs: int,
    quantities: Mapping[str, Quantity],
    *,
    size: tuple[int, int],
    device: torch.device,
    label: str,
) -> dict[str, Tensor]:
    """Each quantity (n, ...) of the first n pairs, from their images at `size`, height and width.

    Every image is decoded once. Each process takes its share, and all get everything.
    """
    measured: dict[str, list[Tensor]] = {name: [] for name in quantities}
    is_shared = num_pairs >= distributed.count()
    shard = torch.arange(num_pairs)[distributed.share(num_pairs) if is_shared else slice(None)]

    def read(pairs: list[PreferencePair]) -> tuple[list[PreferencePair], Tensor]:
        images = torch.stack([_pixels(image, size) for pair in pairs for image in (pair.image_0, pair.image_1)])
        return pairs, images.pin_memory() if device.type == "cuda" else images

    parts = shard.split(PAIRS_AT_A_TIME)
    decoded = ahead(read, ([stored[i] for i in part.tolist()] for part in parts), depth=2)
    for pairs, pixels in progress(decoded, total=len(parts), label=label):
        images = pixels.to(device, non_blocking=True).float() / 255
        for name, quantity in quantities.items():
            measured[name].append(quantity(pairs, images))
    made = {name: torch.cat(tensors) for name, tensors in measured.items()}
    return {name: distributed.gather(tensor) for name, tensor in made.items()} if is_shared else made


def _pixels(data: bytes, size: tuple[int, int]) -> Tensor:
    """Decoded image (3, *size), uint8: resized until it covers the size, the rest cropped."""
    image = ImageOps.fit(decode_image(data), size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
