"""Align the diffusion model by one method of the profile: a LoRA, saved several times along the way."""

from pathlib import Path

import torch

from spo.config import Config
from spo.device import best_device
from spo.errors import DataError
from spo.files import atomic_path, write_json
from spo.methods.spo import Spo
from spo.models.load import build
from spo.models.lora import add_lora
from spo.preference.checkpoint import load_preference_model
from spo.preference.score import PreferenceScorer
from spo.tracking import Tracker
from spo.training.align import align


def run(config: Config, name: str, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write checkpoints/, history.csv, timesteps.csv and metrics.json to runs/<profile>/align/<name>."""
    settings = config.align[name]
    device = best_device()
    policy = build(config.model, config.sampling, device)
    if settings.full_fine_tuning:
        policy.unfreeze()
    else:
        add_lora(policy.unet, settings.lora, seed=settings.seed)
    preference = load_preference_model(root / config.folder("train_preference") / "model")
    scorer = PreferenceScorer(preference, device=device, dtype=getattr(torch, config.train_preference.dtype))
    prompts = training_prompts(root / config.folder("prepare") / "prompts" / "train.txt")
    method = Spo(settings, policy, scorer, prompts)
    with atomic_path(root / config.folder("align") / name) as folder:
        folder.mkdir()
        metrics = align(method, policy, settings, folder, tracker)
        write_json(folder / "metrics.json", metrics)


def training_prompts(path: Path) -> list[str]:
    """The prepared prompts, one a line; DataError where they are missing."""
    if not path.is_file():
        raise DataError(f"{path} is missing; run `python -m spo prepare`")
    return path.read_text(encoding="utf-8").splitlines()
