"""The prepared pairs as training sees them: latents and labels, made once and kept under .cache/latents.

Encoding a large data set takes hours, and `train_preference`, every training of Diffusion-DPO and every run that goes
on after it was stopped want the same latents. They are kept under a hash of all that they depend on.
"""

import json
from pathlib import Path

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
VERSION = 2  # of what is kept: another one wherever the same inputs would give other latents or labels


def load_pairs(
    path: Path, base: LatentDiffusion, config: Config, *, cache: Path, limit: int | None = None
) -> LabelledPairs:
    """Prepared pairs (the first `limit`) with their images encoded, and their labels: people's, or a model's.

    What is not in the folder `cache` yet is made and kept there, in place of what was made of other pairs or by other
    settings. Raises DataError where no pair is decided, for then there is nothing to learn or to measure.
    """
    stored = PreferencePairs(path)
    num_pairs = min(len(stored), limit or len(stored))
    file = cache / f"{path.stem}-{_key(path, num_pairs, base, config)}.safetensors"
    had = kept(file) if distributed.gather_objects(file.exists())[0] else None
    made = had or _encode(stored, num_pairs, base, config, label=f"encode {path.stem} pairs")
    if had is None and distributed.is_main():
        keep(file, made)
        for other in cache.glob(f"{path.stem}-*.safetensors"):
            if other != file:
                other.unlink(missing_ok=True)
    captions = stored.captions[:num_pairs]
    result = LabelledPairs(made["latents"], made["label"], prompt_weights(captions), captions)
    if not (result.label[:, 0] != result.label[:, 1]).any():
        raise DataError(f"{path}: all {len(result)} pairs are ties; there must be decided ones")
    return result


def _key(path: Path, num_pairs: int, base: LatentDiffusion, config: Config) -> str:
    """Of all that latents and labels depend on."""
    labels, vae = config.labels, base.autoencoder.vae
    made_of = {
        "version": VERSION,
        "pairs": fingerprint_of_pairs(path),
        "num_pairs": num_pairs,
        "resolution": config.model.resolution,
        "vae": [tensor_hash(vae.state_dict()), vae.config.scaling_factor, vae.config.shift_factor],
        "labels": labels.model_dump(mode="json"),
        "models": fingerprints({"labels": labels.model, "processor": labels.processor}),
    }
    return json_hash(made_of)


def fingerprint_of_pairs(path: Path) -> str:
    """Tells prepared pairs from others: by every caption and label, and of big files by a part of the images."""
    stored = PreferencePairs(path)
    read = json.dumps([stored.captions, stored.labels])
    return f"{fingerprint(path)} {short_hash(read)}"


def _encode(
    stored: PreferencePairs, num_pairs: int, base: LatentDiffusion, config: Config, *, label: str
) -> dict[str, Tensor]:
    """`latents` (n, 2, c, h, w) and `label` (n, 2) of the first n pairs; of several processes each makes its share."""
    labels, resolution = config.labels, config.model.resolution
    labeller = _labeller(labels, base) if labels.model else None
    latents, opinions = [], []
    shared_out = num_pairs >= distributed.count()
    mine = torch.arange(num_pairs)[distributed.share(num_pairs) if shared_out else slice(None)]

    def read(pairs: list[PreferencePair]) -> tuple[list[PreferencePair], Tensor]:
        images = torch.stack([_pixels(image, resolution) for pair in pairs for image in (pair.image_0, pair.image_1)])
        return pairs, images.pin_memory() if base.device.type == "cuda" else images

    parts = mine.split(PAIRS_AT_A_TIME)
    decoded = ahead(read, ([stored[i] for i in part.tolist()] for part in parts), depth=2)
    for pairs, pixels in progress(decoded, total=len(parts), label=label):
        images = pixels.to(base.device, non_blocking=True).float() / 255
        latents.append(base.autoencoder.encode(images).cpu().unflatten(0, (-1, 2)))
        opinions.append(_opinion(labeller, images, pairs, labels) if labeller else _votes(pairs))
    made = {"latents": torch.cat(latents), "label": torch.cat(opinions)}
    return {name: distributed.gather(tensor) for name, tensor in made.items()} if shared_out else made


def _labeller(labels: LabelsConfig, base: LatentDiffusion) -> PreferenceScorer:
    assert labels.model is not None  # the configuration sees to it
    return PreferenceScorer(load_clip(labels.model, processor=labels.processor), device=base.device)


def _votes(pairs: list[PreferencePair]) -> Tensor:
    return human_labels(torch.tensor([[pair.label_0, pair.label_1] for pair in pairs]))


def _opinion(labeller: PreferenceScorer, images: Tensor, pairs: list[PreferencePair], labels: LabelsConfig) -> Tensor:
    text = labeller.encode([pair.caption for pair in pairs]).repeat_interleave(2, dim=0)
    scores = labeller.score_images(images, text, torch.zeros(len(images), dtype=torch.long)).cpu()
    return pseudo_labels(scores.unflatten(0, (-1, 2)), tie_margin=labels.tie_margin)


def _pixels(data: bytes, resolution: int) -> Tensor:
    """Image bytes as (3, resolution, resolution) of 8 bits: shortest side resized, centre cropped."""
    image = ImageOps.fit(decode_image(data), (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
