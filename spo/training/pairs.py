"""The latents and labels of the prepared pairs.

`train_preference`, every training of Diffusion-DPO and every resumed run need the same latents, so they are kept
(spo/training/measure.py). A folder's name has hashes of all that its content depends on.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spo.config import Config, LabelsConfig
from spo.core.types import LabelledPairs
from spo.data.buckets import bucket_sizes
from spo.data.preferences import PreferencePairs
from spo.errors import DataError
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.checkpoint import load_clip
from spo.preference.labels import human_labels, prompt_weights, pseudo_labels
from spo.preference.score import PreferenceScorer
from spo.runtime import distributed
from spo.runtime.hashing import fingerprint, fingerprints, json_hash, short_hash, tensor_hash
from spo.training.measure import Quantity, measure

VERSION = 5  # of the kept content; raise it if the same inputs give other latents or labels


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

    labels: None: the profile's. Latents stay in files of the folder `cache`, where they and a model's labels are kept;
    those of changed pairs, settings or autoencoders are removed. They have half precision unless the base computes in
    float32. Raises DataError if all pairs are ties, because then there is nothing to learn or to measure.
    """
    stored, labels = PreferencePairs(path), labels or config.labels
    rows = spread(len(stored), min(len(stored), limit or len(stored)))
    latents = kept_in(cache, path, config, what="latents", of=_encoder_key(base), limit=limit)
    quantities = {latents: lambda: _encoding(base)}
    scores: Path | None = None
    if labels.model:
        models = fingerprints({"labels": labels.model, "processor": labels.processor})
        scores = kept_in(cache, path, config, what="scores", of=models, limit=limit)
        quantities[scores] = lambda: _scoring(labels, base.device)
    sizes, label = bucket_sizes(config.model.size, config.model.bucket_step), f"encode {path.stem} pairs"
    found = measure(stored, rows, quantities, sizes=sizes, device=base.device, label=label)
    if distributed.is_main():
        _remove_stale(latents)
    if scores:
        shares = pseudo_labels(found[scores].of_pairs(), tie_margin=labels.tie_margin)
    else:
        shares = human_labels(torch.tensor(stored.labels[rows.numpy()]))
    if not (shares[:, 0] != shares[:, 1]).any():
        raise DataError(f"{path}: all {len(rows)} pairs are ties; some pairs must have a winner")
    captions, pictures = stored.captions.take(rows.numpy()), found[latents]
    weight = prompt_weights(captions)
    return LabelledPairs(pictures.pictures, pictures.bucket, pictures.members, shares, weight, captions)


def spread(total: int, num: int) -> Tensor:
    """`num` rows of `total` (num,), evenly spread, so that a part of a file has captions from all of it."""
    return torch.arange(num) * total // num


def kept_in(cache: Path, path: Path, config: Config, *, what: str, of: object, limit: int | None = None) -> Path:
    """The folder where a quantity of a file's pictures is kept: <pairs>-<limit>-<hash of pairs>-<what>-<hash of `of`>.

    of: all that the quantity depends on beside the pictures and their size, as JSON.
    """
    pictures = json_hash([VERSION, fingerprint_of_pairs(path), config.model.size, config.model.bucket_step])
    return cache / f"{path.stem}-{limit or 'all'}-{pictures}-{what}-{json_hash(of)}"


def _remove_stale(latents: Path) -> None:
    """Remove what is kept of other pairs or sizes than those of the folder `latents`, and other latents of them."""
    pictures, what, _ = latents.name.rsplit("-", 2)
    for other in latents.parent.glob(f"{pictures.rsplit('-', 1)[0]}-*"):
        is_stale = not other.name.startswith(f"{pictures}-") or other.name.startswith(f"{pictures}-{what}-")
        if is_stale and other != latents:
            shutil.rmtree(other, ignore_errors=True)
    for file in latents.parent.glob("*.safetensors"):  # kept by versions before 5
        file.unlink(missing_ok=True)


def _encoder_key(base: LatentDiffusion) -> list[object]:
    """All that latents depend on beside the pictures."""
    vae = base.autoencoder.vae
    factors = [vae.config.scaling_factor, vae.config.shift_factor]
    return [tensor_hash(vae.state_dict()), *factors, str(_latents_dtype(base))]


def _latents_dtype(base: LatentDiffusion) -> torch.dtype:
    return torch.float32 if base.dtype == torch.float32 else torch.float16


def _encoding(base: LatentDiffusion) -> Quantity:
    return lambda images, _: base.autoencoder.encode(images).to("cpu", _latents_dtype(base))


def _scoring(labels: LabelsConfig, device: torch.device) -> Quantity:
    """A clean-image model's scores (n,)."""
    assert labels.model is not None
    labeller = PreferenceScorer(load_clip(labels.model, processor=labels.processor), device=device)

    def scores(images: Tensor, captions: Sequence[str]) -> Tensor:
        t = torch.zeros(len(images), dtype=torch.long)
        return labeller.score_images(images, labeller.encode(captions), t).cpu()

    return scores


def fingerprint_of_pairs(path: Path) -> str:
    """A fingerprint of every caption and label and, in big files, of a part of the images."""
    stored = PreferencePairs(path)
    return f"{fingerprint(path)} {stored.captions.digest()} {short_hash(stored.labels.tobytes())}"
