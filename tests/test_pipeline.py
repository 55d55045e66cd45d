"""The whole pipeline as users run it, on all families' real architectures with random weights."""

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Generator

from spo.__main__ import main
from spo.config import FLOW
from spo.models.generate import image_seed
from spo.models.lora_file import WEIGHTS
from spo.world.pretraining.clip import new_clip, new_tokenizer, save_clip
from spo.world.scenes import all_scenes, draw_attributes, draw_quality, render
from tests.models.tiny import FAMILIES, FLOWS, RESOLUTION, T5_TOKENS, load_plainly, make_tiny_pipeline

EXPORTS = {"diffusers": "spo", "kohya": "spo.safetensors", "merged": "merged"}
PROMPTS = [scene.prompt for scene in all_scenes()[::24]]


def jpeg(picture: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_preferences(file: Path) -> None:
    generator = Generator().manual_seed(0)
    scenes = all_scenes()[::24] * 2
    first, second = (
        render(draw_attributes(scenes, generator), draw_quality(len(scenes), generator, flaw=flaw), generator)
        for flaw in (0.2, 1.0)
    )
    pq.write_table(
        pa.table(
            {
                "caption": [scene.prompt for scene in scenes],
                "jpg_0": [jpeg(picture) for picture in first],
                "jpg_1": [jpeg(picture) for picture in second],
                "label_0": [1.0] * len(scenes),
                "label_1": [0.0] * len(scenes),
            }
        ),
        file,
    )


def text_of(family: str) -> dict[str, int]:
    """Few tokens for T5, so that tests are quick."""
    return {"t5_tokens": T5_TOKENS} if family in FLOWS else {}


def make_project(root: Path, family: str) -> Path:
    """A project of the user's own: a model, a CLIP, prompts and preference pairs."""
    (root / "configs").mkdir(parents=True)
    make_tiny_pipeline(family, root / "model")
    tokenizer = new_tokenizer()
    save_clip(new_clip(tokenizer), tokenizer, root / "clip")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    write_preferences(root / "pairs.parquet")
    spo = {"method": "spo", "epochs": 1, "prompts_per_rollout": 6, "candidates": 2, "first_step": 1, "threshold": 0.0}
    spo["branch_steps"] = 4 if family in ("sdxl", "flux") else 1
    spo["optimizer"] = {"learning_rate": 0.05}  # so that the LoRA shows in a picture
    is_flow = family in FLOWS
    scheduler = {"scheduler": FLOW} if is_flow else {}
    config = {
        "model": {"family": family, "path": "model", "resolution": RESOLUTION} | text_of(family),
        "sampling": {"steps": 5},
        "prepare": {
            "prompts": {"source": "prompts.txt"},
            "preferences": {"source": "pairs.parquet"},
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
        },
        "preference_models": {
            "pixel": {
                "start_from": "clip",
                "steps": 3,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "warmup_steps": 1,
                "evaluate_timesteps": [1, 501],
                "candidates": {"metric": {"kind": "oracle"}, "score": "aesthetic", "num_prompts": 2},
            },
        },
        "align": {"spo": {**spo, "checkpoints": 2, "batch_size": 8}},
        "evaluate": {
            "num_prompts": 4,
            "num_validation_prompts": 3,
            "samplers": {
                "plain": {"steps": 3, "eta": 0.0, **scheduler},
                "stochastic": {"steps": 3, "eta": 1.0, **scheduler},
            },
            "batch_size": 4,
            "metrics": [{"kind": "oracle"}, {"kind": "clip", "name": "clipscore", "model": "clip"}],
            "primary": "aesthetic",
            "guarded": ["clipscore"],
            "bootstrap_samples": 200,
        },
    }
    (root / "configs" / "own.yaml").write_text(yaml.safe_dump(config))
    (root / "params.yaml").write_text("profile: own\nmethods: [spo]\n")
    return root


def spo(root: Path, *commands: list[str]) -> int:
    """Commands as typed one after the other in `root` until one fails; the last one's exit code."""
    with contextlib.chdir(root):
        return next((code for arguments in commands if (code := main(arguments))), 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_goes_from_prompts_and_pairs_to_a_report_and_a_lora(family, tmp_path):
    root = make_project(tmp_path / "project", family)
    exports = [["export", "--format", format, "--out", out] for format, out in EXPORTS.items()]
    stages = (["prepare"], ["train_preference", "pixel"], ["align", "spo"], ["evaluate"], ["report"])
    assert spo(root, *stages, *exports) == 0
    run = root / "runs" / "own"
    metrics = json.loads((run / "evaluate" / "metrics.json").read_text())
    for score in ("aesthetic", "clipscore"):  # the primary and the guarded one
        spo_gain = metrics["spo"]
        assert spo_gain[f"{score}_gain_low"] <= spo_gain[f"{score}_gain"] <= spo_gain[f"{score}_gain_high"]
    assert metrics["contrast"]["factor"] >= 1
    with (run / "evaluate" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 4  # columns, samplers, prompts
    assert len(list((run / "evaluate" / "images" / "spo" / "seed-0").glob("*.png"))) == 4
    assert "<html" in (run / "report" / "report.html").read_text()

    evaluated = run / "evaluate" / "lora" / "spo"
    assert (evaluated / WEIGHTS).is_file()
    assert_same(plain_picture(root), run / "evaluate" / "images" / "base" / "0000-0.png")
    for lora in (evaluated, root / "spo", root / "spo.safetensors"):
        assert_same(plain_picture(root, lora=lora), run / "evaluate" / "images" / "spo" / "seed-0" / "0000-0.png")
    assert_same(plain_picture(root, "merged"), run / "evaluate" / "images" / "spo" / "seed-0" / "0000-0.png")
    assert (plain_picture(root, lora=evaluated) - plain_picture(root)).abs().max() > 2


def plain_picture(root: Path, model: str = "model", lora: Path | None = None) -> torch.Tensor:
    """What plain diffusers makes of the first test prompt with evaluation's sampler and seed: (h, w, 3) in [0, 255]."""
    pipeline = load_plainly(root / model)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    prompt = (root / "runs/own/prepare/prompts/test.txt").read_text().splitlines()[0]
    generator = Generator().manual_seed(image_seed(1234, prompt, 0))
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": RESOLUTION, "width": RESOLUTION}
    if isinstance(pipeline, FluxPipeline | StableDiffusion3Pipeline):
        options["max_sequence_length"] = T5_TOKENS
    return torch.from_numpy(pipeline(prompt, generator=generator, output_type="np", **options).images[0]) * 255


def assert_same(picture: torch.Tensor, file: Path) -> None:
    """To the rounding of a PNG's 8 bits."""
    with Image.open(file) as image:
        torch.testing.assert_close(picture, torch.from_numpy(np.asarray(image).copy()).float(), atol=1.01, rtol=0)


@pytest.mark.slow
def test_a_mistake_ends_a_stage_with_one_line_and_nothing_half_written(tmp_path, capsys):
    root = make_project(tmp_path / "project", "sd15")
    capsys.readouterr()
    assert spo(root, ["train_preference", "pixel"]) == 1  # before prepare
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "run `python -m spo prepare`" in error
    assert not (root / "runs").exists()
