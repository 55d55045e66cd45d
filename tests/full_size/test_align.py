"""One round of SPO with Stable Diffusion v1.5 and PickScore at their full sizes, random weights, on a CPU.

`make full-size` runs it. It writes 8.5 GB to the temporary folder and takes four minutes on one core. What a process
owns is its resident memory without mapped files: most weights stay in their files, and the system may drop such pages.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from bench.systems import PIPELINES, SHAPES, make_preference
from spo.preference.checkpoint import save_preference_model

pytestmark = pytest.mark.skipif(not os.environ.get("SPO_FULL_SIZE"), reason="takes minutes; `make full-size` runs it")
RESOLUTION, MOST_OWNED = 256, 6e9  # bytes
PROFILE = {
    "model": {"family": "sd15", "path": "model", "resolution": RESOLUTION},
    "sampling": {"steps": 3},
    "prepare": {"prompts": {"source": "prompts.txt"}, "validation_fraction": 0.2, "test_fraction": 0.2},
    "preference_models": {"pixel": {"start_from": "preference", "checkpoint": "preference"}},
    "align": {
        "spo": {
            "method": "spo",
            "epochs": 1,
            "rollouts_per_epoch": 1,
            "prompts_per_rollout": 2,
            "candidates": 2,
            "first_step": 1,
            "threshold": 0.0,
            "batch_size": 2,
            "micro_batch_size": 1,
            "checkpoints": 1,
            "optimizer": {"learning_rate": 0.01},
        }
    },
    "evaluate": {
        "num_prompts": 2,
        "num_validation_prompts": 2,
        "metrics": [{"kind": "oracle"}],
        "primary": "aesthetic",
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, models of full size, and a profile that uses them; the preference model counts as trained."""
    root = tmp_path_factory.mktemp("full-size")
    torch.manual_seed(0)
    PIPELINES["sd15"](replace(SHAPES["sd15"], resolution=RESOLUTION)).save_pretrained(root / "model")
    preference = make_preference(SHAPES["sd15"], "cpu")
    folder = root / "runs" / "own" / "preference_models" / "pixel"
    folder.parent.mkdir(parents=True)
    save_preference_model(preference.model, preference.tokenizer, preference.preprocess, folder)
    (root / "preference").symlink_to(folder)
    (root / "prompts.txt").write_text("".join(f"a picture of number {i}\n" for i in range(20)))
    (root / "configs").mkdir()
    (root / "configs" / "own.yaml").write_text(yaml.safe_dump(PROFILE))
    (root / "params.yaml").write_text("profile: own\nmethods: [spo]\ntrain_preference: [pixel]\n")
    return root


def spo(root: Path, *arguments: str) -> int:
    """Run a command; the most memory that it owned, in bytes."""
    owned = 0
    with subprocess.Popen([sys.executable, "-m", "spo", *arguments], cwd=root) as process:
        while process.poll() is None:
            memory = psutil.Process(process.pid).memory_info()
            owned = max(owned, memory.rss - memory.shared)
            time.sleep(0.1)
    assert process.returncode == 0
    return owned


def test_a_round_of_full_size_fits_and_plain_diffusers_loads_its_lora(project: Path) -> None:
    spo(project, "prepare")
    owned = spo(project, "align", "spo")
    assert 1e9 < owned < MOST_OWNED, f"{owned / 1e9:.1f} GB"
    [checkpoint] = (project / "runs/own/align/spo/seed-0/checkpoints").iterdir()
    pipeline = StableDiffusionPipeline.from_pretrained(project / "model").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def paint() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": RESOLUTION, "width": RESOLUTION, "output_type": "pt"}
        return pipeline("a picture", generator=generator, **options).images

    before = paint()
    pipeline.load_lora_weights(checkpoint)
    after = paint()
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-3
    print(f"owned {owned / 1e9:.1f} GB at most")
