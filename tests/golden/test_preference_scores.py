"""The published step-aware preference model's scores, from its own checkpoint format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig

from spo.preference.checkpoint import read_published
from spo.preference.pixel import StepAwareCLIP
from spo.preference.preprocess import Preprocessing

GOLDEN = Path(__file__).parent


@pytest.fixture(scope="module")
def figures() -> dict[str, torch.Tensor]:
    prefix = "spm."
    tensors = load_file(GOLDEN / "tensors.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def model() -> StepAwareCLIP:
    config = CLIPConfig.from_dict(json.loads((GOLDEN / "spm" / "config.json").read_text()))
    return read_published(GOLDEN / "spm" / "spm_official.bin", config)


@pytest.fixture(scope="module")
def preprocess() -> Preprocessing:
    values = json.loads((GOLDEN / "spm" / "preprocess.json").read_text())
    mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    return Preprocessing(size=values["img_size"], mean=mean, std=std, mode="published")


@pytest.mark.parametrize(
    ("images", "scores", "at_zero"),
    [("images", "scores", False), ("images", "scores_t0", True), ("images_wide", "scores_wide", False)],
)
@torch.no_grad()
def test_scores_are_the_published_ones(
    figures: dict[str, torch.Tensor],
    model: StepAwareCLIP,
    preprocess: Preprocessing,
    images: str,
    scores: str,
    at_zero: bool,
):
    pixels = preprocess(figures[images] / 2 + 0.5)  # theirs are in [-1, 1]
    n = len(pixels)
    t = torch.zeros(n, dtype=torch.long) if at_zero else figures["timesteps"][:n]
    text = model.text_features(figures["input_ids"][:n])
    torch.testing.assert_close(model.score(model.image_features(pixels, t), text), figures[scores], rtol=1e-4, atol=0)
