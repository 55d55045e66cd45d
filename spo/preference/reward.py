"""A preference model that is anybody's own function of images: a core.types.Scorer."""

import importlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spo.core.types import Candidates
from spo.errors import ModelError, one_line
from spo.preference.checkpoint import FORMAT, VERSION, read_settings
from spo.runtime.files import write_json

Reward: TypeAlias = Callable[[Tensor, list[str], float], Tensor]
"""Scores (n,) of images (n, 3, height, width) in [0, 1], by n prompts and a timestep in [0, 1000]; higher is better."""


class RewardScorer:
    """Scores candidates by a reward of their decoded x_0, without gradients."""

    def __init__(self, reward: Reward):
        self.reward = reward

    def encode(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def __call__(self, candidates: Candidates) -> Tensor:
        """Scores (k, b), float32, of candidates whose `text` is what `encode` gave."""
        k = len(candidates.x)
        scores = self.score_images(candidates.images.flatten(0, 1), candidates.text * k, torch.tensor(candidates.t))
        return scores.unflatten(0, (k, -1))

    @torch.no_grad()
    def score_images(self, images: Tensor, text: list[str], t: Tensor) -> Tensor:
        """Scores (n,) of images (n, 3, H, W) in [0, 1] by n prompts, all at the timestep t (); ModelError if not n."""
        scores = self.reward(images, text, float(t))
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ModelError(
                f"the reward gave {got} for {len(images)} images; it should give a tensor ({len(images)},)"
            )
        return scores.to(images.device, torch.float32)


def save_reward(class_name: str, options: Mapping[str, Any], modules: Path, folder: Path) -> None:
    """Write a preference model's folder for `load_reward`, with a copy of the folder `modules`; it must not exist."""
    shutil.copytree(modules, folder / "code", ignore=shutil.ignore_patterns("__pycache__"))
    settings = {"kind": "custom", "class": class_name, "options": dict(options)}
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, **settings})


def load_reward(folder: Path) -> RewardScorer:
    """The scorer of a folder of `save_reward`, whose code runs; ModelError as in `make_reward`."""
    settings = read_settings(folder, kind="custom")
    return make_reward(settings["class"], settings["options"], folder / "code")


def make_reward(class_name: str, options: Mapping[str, Any], modules: Path) -> RewardScorer:
    """The scorer of a class "MODULE:CLASS" whose module lies in `modules`; ModelError if it cannot be made."""
    module, _, name = class_name.partition(":")
    if not (modules / f"{module}.py").is_file():
        raise ModelError(f"class={class_name!r}: there is no {modules / module}.py; put the module there")
    sys.path.insert(0, str(modules.resolve()))
    try:
        importlib.invalidate_caches()
        sys.modules.pop(module, None)  # another folder's
        return RewardScorer(getattr(importlib.import_module(module), name)(**options))
    except Exception as error:
        raise ModelError(f"class={class_name!r} cannot be made: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.pop(0)
