"""The embedded default as it is shipped: what its cards say holds, with room for chance."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.calibration import read_pool
from spo.config import load_config
from spo.data.prompts import split_prompts
from spo.models.generate import eight_bits, generate, image_seed
from spo.models.load import build
from spo.world.oracle import oracle_scores
from spo.world.pretraining.calibration import RANGES, agreement
from spo.world.pretraining.recipe import RECIPE
from spo.world.scenes import all_scenes

ROOT = Path(__file__).parents[1]


def test_the_prompt_file_holds_the_whole_world():
    prompts = (ROOT / "data" / "prompts" / "world.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == [scene.prompt for scene in all_scenes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "least", "spread"),
    [
        ("tiny", {"correct": 0.9, "alignment": 0.9, "aesthetic": 0.45}, 0.15),
        ("tiny-flow", {"correct": 0.6, "alignment": 0.6, "aesthetic": 0.25}, 0.1),
    ],
)
def test_the_base_knows_its_prompts_and_chance_decides_how_well_it_finishes_pictures(
    profile, least, spread, monkeypatch
):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT, profile)
    prompts = split_prompts(
        [scene.prompt for scene in all_scenes()],
        seed=config.seed,
        validation_fraction=config.prepare.validation_fraction,
        test_fraction=config.prepare.test_fraction,
    ).test[:48]
    pictures = generate(
        build(config.model, config.sampling, "cpu"),
        prompts,
        [image_seed(11, prompt, 0) for prompt in prompts],
        sampler=config.evaluate.samplers[config.evaluate.deciding],
        batch_size=48,
        label="base",
    )
    seen = oracle_scores(eight_bits(pictures), prompts)
    for name, share in least.items():
        assert seen[name].mean() > share, name
    assert seen["aesthetic"].mean() < 0.75
    assert seen["aesthetic"].std() > spread


@pytest.mark.slow
def test_the_labels_like_peoples_agree_with_the_scores_as_far_as_they_should(tmp_path):
    """On 100 of the 576 prompts, with room for chance: a standard error is about .015."""
    table = pq.read_table(ROOT / "data" / "preferences" / "tiny-people" / "pairs.parquet")
    pq.write_table(table.take(list(range(0, 500, 5))), tmp_path / "pairs.parquet")
    found = agreement(read_pool(tmp_path), RECIPE.people)
    for name, (low, high) in RANGES.items():
        assert low - 0.04 < found[name] < high + 0.04, name


def test_the_repository_stays_small():
    size = sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file())
    assert size < 40e6


def test_weights_are_safetensors_alone():
    files = [path for path in (ROOT / "data" / "base").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}
    for name, pipeline in (("tiny", "StableDiffusionPipeline"), ("tiny-flow", "StableDiffusion3Pipeline")):
        index = json.loads((ROOT / "data" / "base" / name / "model_index.json").read_text())
        assert index["_class_name"] == pipeline


def test_shipped_files_name_no_folder_of_a_machine():
    for path in (ROOT / "data" / "base").rglob("*.json"):
        settings = json.loads(path.read_text())
        assert not str(settings.get("_name_or_path") or "").startswith("/"), path
