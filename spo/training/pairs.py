"""The latents and labels of the prepared pairs, cached under .cache/latents.

Encoding a large data set takes hours, and `train_preference`, every training of Diffusion-DPO and every resumed run
need the same latents. A file's name has a hash of everything that its content depends on.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from spo.config import Config
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
VERSION = 2  # of the cached content; raise it if the same inputs give other latents or labels


def load_pairs(
    path: Path, base: LatentDiffusion, config: Config, *, cache: Path, limit: int | None = None
) -> LabelledPairs:
    """The first `limit` prepared pairs with encoded images and their labels, by people or by a model.

    They come from the folder `cache` or are made and stored there, which removes those of other pairs or settings.
    Raises DataError if all pairs are ties, because then there is nothing to learn or to measure.
    """
    stored = PreferencePairs(path)
    num_pairs = min(len(stored), limit or len(stored))
    file = cache / f"{path.stem}-{_key(path, num_pairs, base, config)}.safetensors"
    cached = kept(file) if distributed.gather_objects(file.exists())[0] else None
    made = cached or _encode(stored, num_pairs, base, config, label=f"encode {path.stem} pairs")
    if cached is None and distributed.is_main():
        keep(file, made)
        for other in cache.glob(f"{path.stem}-*.safetensors"):
            if other != file:
                other.unlink(missing_ok=True)
    captions = stored.captions[:num_pairs]
    result = LabelledPairs(made["latents"], made["label"], prompt_weights(captions), captions)
    if not (result.label[:, 0] != result.label[:, 1]).any():
        raise DataError(f"{path}: all {len(result)} pairs are ties; some pairs must have a winner")
    return result


def _key(path: Path, num_pairs: int, base: LatentDiffusion, config: Config) -> str:
    """A hash of everything that latents and labels depend on."""
    labels, vae = config.labels, base.autoencoder.vae
    inputs = {
        "version": VERSION,
        "pairs": fingerprint_of_pairs(path),
        "num_pairs": num_pairs,
        "resolution": config.model.resolution,
        "vae": [tensor_hash(vae.state_dict()), vae.config.scaling_factor, vae.config.shift_factor],
        "labels": labels.model_dump(mode="json"),
        "models": fingerprints({"labels": labels.model, "processor": labels.processor}),
    }
    return json_hash(inputs)


def fingerprint_of_pairs(path: Path) -> str:
    """A fingerprint of every caption and label and, in big files, of a part of the images."""
    stored = PreferencePairs(path)
    read = json.dumps([stored.captions, stored.labels])
    return f"{fingerprint(path)} {short_hash(read)}"


def _encode(
    stored: PreferencePairs, num_pairs: int, base: LatentDiffusion, config: Config, *, label: str
) -> dict[str, Tensor]:
    """`latents` (n, 2, c, h, w) and `label` (n, 2) of the first n pairs; each process encodes its share."""
    labels, resolution = config.labels, config.model.resolution
    clip = load_clip(labels.model, processor=labels.processor) if labels.model else None
    labeller = PreferenceScorer(clip, device=base.device) if clip else None
    latents, label_parts = [], []
    is_shared = num_pairs >= distributed.count()
    shard = torch.arange(num_pairs)[distributed.share(num_pairs) if is_shared else slice(None)]

    def read(pairs: list[PreferencePair]) -> tuple[list[PreferencePair], Tensor]:
        images = torch.stack([_pixels(image, resolution) for pair in pairs for image in (pair.image_0, pair.image_1)])
        return pairs, images.pin_memory() if base.device.type == "cuda" else images

    parts = shard.split(PAIRS_AT_A_TIME)
    decoded = ahead(read, ([stored[i] for i in part.tolist()] for part in parts), depth=2)
    for pairs, pixels in progress(decoded, total=len(parts), label=label):
        images = pixels.to(base.device, non_blocking=True).float() / 255
        latents.append(base.autoencoder.encode(images).cpu().unflatten(0, (-1, 2)))
        if labeller:
            text = labeller.encode([pair.caption for pair in pairs]).repeat_interleave(2, dim=0)
            scores = labeller.score_images(images, text, torch.zeros(len(images), dtype=torch.long)).cpu()
            label_parts.append(pseudo_labels(scores.unflatten(0, (-1, 2)), tie_margin=labels.tie_margin))
        else:
            label_parts.append(human_labels(torch.tensor([[pair.label_0, pair.label_1] for pair in pairs])))
    made = {"latents": torch.cat(latents), "label": torch.cat(label_parts)}
    return {name: distributed.gather(tensor) for name, tensor in made.items()} if is_shared else made


def _pixels(data: bytes, resolution: int) -> Tensor:
    """Decoded image (3, resolution, resolution), uint8: the shortest side is resized, the rest cropped."""
    image = ImageOps.fit(decode_image(data), (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
