"""Pairs of pictures of several shapes, from the file to trained models."""

import contextlib
import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from spo.config import load_config
from spo.models.network import Network
from spo.runtime.files import read_json
from spo.stages import align, prepare, train_preference
from spo.tracking import NullTracker
from spo.workspace import Workspace
from tests.test_pipeline import make_project

SHAPES = [(64, 64), (128, 32), (32, 128)]  # width and height


def reshaped(data: bytes, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).resize(size).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_pairs_of_all_shapes_train_preference_models_and_diffusion_dpo(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_project(tmp_path / "project", family)
    rows = pq.read_table(root / "pairs.parquet").to_pylist()
    for number, row in enumerate(rows):
        row |= {name: reshaped(row[name], SHAPES[number % 3]) for name in ("jpg_0", "jpg_1")}
    pq.write_table(pq.read_table(root / "pairs.parquet").from_pylist(rows), root / "pairs.parquet")
    path = root / "configs" / "own.yaml"
    values = yaml.safe_load(path.read_text())
    values["model"]["bucket_step"] = 8
    values["preference_models"]["pixel"] |= {"steps": 4, "batch_size": 12, "candidates": None}
    latent = {"kind": "latent", "steps": 4, "batch_size": 12, "warmup_steps": 1, "evaluate_timesteps": [1]}
    values["preference_models"]["latent"] = latent
    values["align"] = {"diffusion_dpo": {"method": "diffusion_dpo", "epochs": 1, "batch_size": 6, "lora": {"rank": 2}}}
    path.write_text(yaml.safe_dump(values))
    (root / "params.yaml").write_text("profile: own\nmethods: [diffusion_dpo]\ntrain_preference: [pixel, latent]\n")
    seen: set[tuple[int, int]] = set()
    predict = Network.predict

    def noted(self: Network, x_t: torch.Tensor, *others: object, **options: object) -> torch.Tensor:
        seen.add((x_t.shape[-2], x_t.shape[-1]))
        return predict(self, x_t, *others, **options)

    with contextlib.chdir(root):
        config = load_config()
        prepare.run(config, tracker=NullTracker())
        for name in ("pixel", "latent"):
            train_preference.run(config, name, tracker=NullTracker())
        monkeypatch.setattr(Network, "predict", noted)
        align.run(config, "diffusion_dpo", 0, tracker=NullTracker())
        metrics = read_json(Workspace(config).aligned("diffusion_dpo", 0) / "metrics.json")
    assert seen == {(8, 8), (4, 16), (16, 4)}
    assert metrics["num_examples"] == len(pq.read_table(root / "runs/own/prepare/preferences/train.parquet"))
