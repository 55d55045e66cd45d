"""The preference model that `train_preference` left, as the judge of candidates."""

from pathlib import Path

import torch

from spo.config import Config
from spo.preference.checkpoint import load_preference_model
from spo.preference.score import PreferenceScorer


def load_scorer(config: Config, root: Path, device: torch.device) -> PreferenceScorer:
    """ModelError where it is missing."""
    preference = load_preference_model(root / config.folder("train_preference") / "model")
    return PreferenceScorer(preference, device=device, dtype=getattr(torch, config.train_preference.dtype))
