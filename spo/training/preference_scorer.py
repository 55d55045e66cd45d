"""The preference model that `train_preference` left, as the scorer of candidates."""

from pathlib import Path

import torch

from spo.config import Config, ScoringConfig
from spo.preference.checkpoint import load_preference_model
from spo.preference.score import PreferenceScorer
from spo.workspace import Workspace


def load_scorer(
    config: Config, root: Path, device: torch.device, scoring: ScoringConfig | None = None
) -> PreferenceScorer:
    """One that was trained blind to t stays so. ModelError where it is missing."""
    scoring = scoring or ScoringConfig()
    preference = load_preference_model(Workspace(config, root).preference_model)
    timestep = 0 if config.train_preference.blind else scoring.timestep
    return PreferenceScorer(preference, device=device, dtype=getattr(torch, scoring.dtype), timestep=timestep)
