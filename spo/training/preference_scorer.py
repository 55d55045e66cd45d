"""The preference model that `train_preference` left, as the judge of candidates."""

from pathlib import Path

import torch

from spo.config import Config
from spo.core.types import Scorer
from spo.methods.spo import BlindScorer
from spo.preference.checkpoint import load_preference_model
from spo.preference.score import PreferenceScorer
from spo.workspace import Workspace


def load_scorer(config: Config, root: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Scorer:
    """One that was trained blind to t stays so. ModelError where it is missing."""
    preference = load_preference_model(Workspace(config, root).preference_model)
    scorer = PreferenceScorer(preference, device=device, dtype=dtype)
    return BlindScorer(scorer, 0) if config.train_preference.blind else scorer
