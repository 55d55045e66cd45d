"""Small versions of the long experiments: they run, resume, and their tables are correct."""

import contextlib
import csv
import io
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Generator

from experiments import best_of, calibration, dpo_curve, methods, share_sweep
from experiments.pictures import Pictures, prepared_pictures
from experiments.relabel import Comparisons, prepared_comparisons, rings, write_pairs
from experiments.workbench import shortened
from spo.config import load_config
from spo.data.preferences import read_pairs
from spo.stages import align, evaluate, prepare, train_preference
from spo.tracking import NullTracker
from spo.workspace import Prepared
from spo.world.opinion import Opinion
from spo.world.pretraining.pairs import compare_all, write_comparisons
from spo.world.pretraining.recipe import RECIPE
from spo.world.scenes import all_scenes, draw_attributes, draw_quality, render
from tests.test_pipeline import jpeg, make_project

pytestmark = pytest.mark.slow
PICTURES = 8  # of each prompt, each compared with the next, as in the embedded default


def write_rings(file: Path) -> None:
    generator = Generator().manual_seed(0)
    scenes = [scene for scene in all_scenes()[::48] for _ in range(PICTURES)]
    pictures = [jpeg(each) for each in render(
        draw_attributes(scenes, generator), draw_quality(len(scenes), generator), generator)]  # fmt: skip
    following = [i - PICTURES + 1 if i % PICTURES == PICTURES - 1 else i + 1 for i in range(len(scenes))]
    table = {
        "caption": [scene.prompt for scene in scenes],
        "jpg_0": pictures,
        "jpg_1": [pictures[i] for i in following],
        "label_0": [float(i % 2) for i in range(len(scenes))],
        "label_1": [float(1 - i % 2) for i in range(len(scenes))],
    }
    pq.write_table(pa.table(table), file)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline has run as far as `align spo`."""
    root = make_project(tmp_path_factory.mktemp("bench") / "project", "sd15")
    write_rings(root / "pairs.parquet")
    path = root / "configs" / "own.yaml"
    values = yaml.safe_load(path.read_text())
    values["align"]["diffusion_dpo"] = {"method": "diffusion_dpo", "beta": 100.0, "batch_size": 16, "lora": {"rank": 2}}
    path.write_text(yaml.safe_dump(values))
    with contextlib.chdir(root):
        config = load_config()
        prepare.run(config, tracker=NullTracker())
        train_preference.run(config, "pixel", tracker=NullTracker())
        align.run(config, "spo", 0, tracker=NullTracker())
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def no_training(*_: object, **__: object) -> None:
    raise AssertionError("what is finished is not done again")


def test_the_curve_has_every_checkpoint_of_both_methods_and_is_not_made_twice(project: Path, monkeypatch) -> None:
    monkeypatch.chdir(project)
    command = ["--quick", "--learning-rates", "1e-3", "1e-4", "--schedule", "linear", "--out", "curve.csv"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert dpo_curve.main(command) == 0
    table = rows(project / "curve.csv")
    assert [row["method"] for row in table] == ["diffusion_dpo"] * 4 + ["spo"] * 2
    assert [row["learning_rate"] for row in table[:4]] == ["0.001"] * 2 + ["0.0001"] * 2
    for one, other in (table[:2], table[2:4], table[4:]):
        assert 0 < int(one["unet_forwards"]) < int(other["unet_forwards"])
    for row in table:
        assert float(row["aesthetic_low"]) <= float(row["aesthetic_difference"]) <= float(row["aesthetic_high"])
    assert "diffusion_dpo" in said.getvalue()

    first = (project / "curve.csv").read_bytes()
    monkeypatch.setattr(align, "run", no_training)
    assert dpo_curve.main(command) == 0
    assert (project / "curve.csv").read_bytes() == first


def test_the_best_of_n_is_compared_with_the_base_and_with_each_method(project: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(project)
    assert best_of.main(["--nums", "2", "--out", "best.csv"]) == 1
    assert "run `python -m spo evaluate`" in capsys.readouterr().err
    evaluate.run(load_config(), root=Path(), tracker=NullTracker())
    assert best_of.main(["--nums", "2", "4", "--out", "best.csv"]) == 0
    table = rows(project / "best.csv")
    assert [(row["column"], row["against"]) for row in table] == [
        ("best of 2", "base"), ("spo", "best of 2"), ("best of 4", "base"), ("spo", "best of 4")]  # fmt: skip
    for row in table:
        assert float(row["aesthetic_low"]) <= float(row["aesthetic_difference"]) <= float(row["aesthetic_high"])


def test_the_calibration_is_a_table_of_the_pairs_it_is_given(tmp_path, capsys) -> None:
    generator = Generator().manual_seed(0)
    scenes = [scene for scene in all_scenes()[:4] for _ in range(6)]
    pictures = render(draw_attributes(scenes, generator), draw_quality(len(scenes), generator), generator)
    index = torch.arange(4).repeat_interleave(6)
    prompts = [scene.prompt for scene in all_scenes()[:4]]
    (tmp_path / "tiny-people").mkdir()
    pool = compare_all(pictures, index, prompts, RECIPE.people, generator)
    write_comparisons(pool, tmp_path / "tiny-people" / "pairs.parquet")
    assert calibration.main([str(tmp_path / "tiny-people")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == 5 and "Pick-a-Pic" in lines[0]
    ties = (pool.label == 0.5).float().mean().item()
    assert lines[-2] == f"| ties | 0.120 | 0.11 to 0.13 | {ties:.3f} |"
    assert lines[-1].endswith("| 60 of 24 pictures |")
    assert calibration.main([str(tmp_path / "mine")]) == 1
    assert "no shipped pairs" in capsys.readouterr().err


def test_the_curve_says_what_to_run_first(project: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(project)
    assert dpo_curve.main(["--quick", "--seed", "3", "--out", "other.csv"]) == 1
    assert "run `python -m spo align spo --seed 3`" in capsys.readouterr().err


def test_the_saving_is_read_off_the_rows() -> None:
    def row(method: str, forwards: int, gain: float, fall: float = 0.0, rate: float = 1.0) -> dict:
        return {
            "method": method,
            "learning_rate": rate,
            "schedule": "constant",
            "unet_forwards": forwards,
            "aesthetic_difference": gain,
            "alignment_difference": -fall,
        }

    evaluate = load_config(Path(__file__).parents[2], "tiny")
    dpo = [row("diffusion_dpo", 1000, 0.01), row("diffusion_dpo", 2000, 0.05), row("diffusion_dpo", 4000, 0.04)]
    [line] = dpo_curve.sentences([*dpo, row("spo", 100, 0.06, fall=0.5), row("spo", 200, 0.05)], evaluate)
    assert "with 10 times less compute: 200 UNet forwards against 2,000" in line
    dpo += [row("diffusion_dpo", 3000, 0.055, rate=0.5), row("diffusion_dpo", 500, 0.9, fall=0.5, rate=0.5)]
    [line] = dpo_curve.sentences([*dpo, row("spo", 200, 0.05), row("spo", 600, 0.06)], evaluate)
    assert "with 5 times less compute: 600 UNet forwards against 3,000" in line  # of the better of its two runs
    [line] = dpo_curve.sentences([*dpo, row("spo", 100, 0.04)], evaluate)
    assert "does not reach" in line


def comparisons(prepared: Prepared, pictures: Pictures) -> dict[str, Comparisons]:
    files = {split: prepared.pairs_file(split) for split in ("train", "validation")}
    return {split: prepared_comparisons(file, pictures) for split, file in files.items()}


@pytest.mark.parametrize(("share", "agreement"), [(1.0, "agrees_finish"), (0.0, "agrees_content")])
def test_new_labels_are_the_opinions_and_nothing_else_changes(project: Path, tmp_path, share, agreement) -> None:
    prepared = Prepared(project / "runs" / "own" / "prepare")
    pictures = prepared_pictures(prepared)
    opinion = Opinion(share, temperature=0.0, tie=0.0)
    found = write_pairs(comparisons(prepared, pictures), tmp_path / "preferences", opinion, seed=0)
    assert found[agreement] > 0.99  # but for pictures that are equally good
    for split in ("train", "validation"):
        before = list(read_pairs(prepared.pairs_file(split)))
        after = list(read_pairs(tmp_path / "preferences" / f"{split}.parquet"))
        assert [(p.caption, p.image_0, p.image_1) for p in before] == [(p.caption, p.image_0, p.image_1) for p in after]
        assert all(pair.label_0 + pair.label_1 == 1 for pair in after)


def test_labels_follow_the_share_and_noise_blurs_them(project: Path, tmp_path) -> None:
    prepared = Prepared(project / "runs" / "own" / "prepare")
    pictures = prepared_pictures(prepared)

    def agreement(share: float, temperature: float) -> float:
        target = tmp_path / f"{share}-{temperature}"
        opinion = Opinion(share, temperature, 0.0)
        return write_pairs(comparisons(prepared, pictures), target, opinion, seed=0)["agrees_finish"]

    assert agreement(0.05, 0.1) < agreement(0.5, 0.1) < agreement(0.95, 0.1)
    assert agreement(0.95, 5.0) < agreement(0.95, 0.1)


def test_rings_compare_each_picture_with_two_others_of_its_prompt(project: Path) -> None:
    pictures = prepared_pictures(Prepared(project / "runs" / "own" / "prepare"))
    found = rings(pictures, Generator().manual_seed(0))
    assert sorted(found.one.tolist()) == sorted(found.other.tolist()) == list(range(len(pictures.prompts)))
    for i, j in zip(found.one.tolist(), found.other.tolist(), strict=True):
        assert i != j
        assert pictures.prompts[i] == pictures.prompts[j]


def test_the_sweep_of_the_base_s_own_pictures_needs_no_preference_model_for_diffusion_dpo(
    project: Path, monkeypatch
) -> None:
    monkeypatch.chdir(project)
    command = ["--quick", "--out", "base.csv", "--pairs", "base", "--methods", "diffusion_dpo", "--shares", "0.05"]
    assert share_sweep.main(command) == 0
    assert [row["pairs"] for row in rows(project / "base.csv")] == ["base"] * 2
    [work] = (project / ".cache" / "bench" / "share_sweep").iterdir()
    assert not (work / "sight").exists()
    [cell] = work.glob("base_share-0.05*")
    pairs = list(read_pairs(cell / "runs" / "own" / "prepare" / "preferences" / "train.parquet"))
    prepared = {p.image_0 for p in read_pairs(project / "runs/own/prepare/preferences/train.parquet")}
    assert pairs
    assert not prepared & {pair.image_0 for pair in pairs}


def test_the_sweep_has_a_row_for_every_comparison_and_goes_on_where_it_stopped(project: Path, monkeypatch) -> None:
    monkeypatch.chdir(project)
    command = ["--quick", "--out", "sweep.csv", "--temperatures", "0.3", "--shares"]
    assert share_sweep.main([*command, "0.1"]) == 0
    first = rows(project / "sweep.csv")
    assert Counter((row["method"], row["against"], row["score"]) for row in first) == Counter(
        (method, against, score)
        for method, against in (("spo", "base"), ("diffusion_dpo", "base"), ("spo", "diffusion_dpo"))
        for score in ("aesthetic", "clipscore")
    )
    for row in first:
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
    [work] = (project / ".cache" / "bench" / "share_sweep").iterdir()
    [start] = work.glob("preference-models/share-0.1*/model.safetensors")
    assert start.read_bytes() != (work / "sight" / "model.safetensors").read_bytes()

    monkeypatch.setattr(align, "run", no_training)
    assert share_sweep.main([*command, "0.1"]) == 0
    assert rows(project / "sweep.csv") == first
    monkeypatch.setattr(share_sweep.Teacher, "teach", no_training)
    with pytest.raises(AssertionError, match="not done again"):
        share_sweep.main([*command, "0.1", "0.5"])
    assert rows(project / "sweep.csv") == first  # a sweep that is killed keeps its finished cells


def test_the_sweep_says_what_it_lacks(project: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(project)
    assert share_sweep.main(["--quick", "--methods", "spo", "ddpo"]) == 1
    assert "has no method ['ddpo']" in capsys.readouterr().err


def test_methods_are_compared_by_their_best_trials_and_no_trial_is_made_twice(project: Path, monkeypatch) -> None:
    monkeypatch.chdir(project)
    command = ["--quick", "--methods", "spo", "diffusion_dpo", "--factors", "1", "0.5", "--out", "compared"]
    command += ["--seeds", "3", "4"]
    assert methods.main(command) == 0
    trials, table = rows(project / "compared" / "trials.csv"), rows(project / "compared" / "methods.csv")
    assert [row["method"] for row in trials] == ["spo", "diffusion_dpo"] * 2
    for full, half in ((trials[0], trials[2]), (trials[1], trials[3])):
        assert float(half["learning_rate"]) == pytest.approx(float(full["learning_rate"]) / 2)
    assert [(row["method"], row["against"], row["trials"]) for row in table] == [
        ("spo", "base", "2"),
        ("diffusion_dpo", "base", "2"),
        ("diffusion_dpo", "spo", "2"),
    ]
    for row in table:
        own = {each["learning_rate"]: each for each in trials if each["method"] == row["method"]}
        assert own[row["learning_rate"]]["checkpoints"] == row["checkpoints"]
        assert row["seeds"] == "3 4" and len(row["checkpoints"].split()) == 2

    monkeypatch.setattr(align, "run", no_training)
    assert methods.main(command) == 0
    assert rows(project / "compared" / "methods.csv") == table
    assert methods.main(["--quick", "--methods", "ddpo"]) == 1


def test_a_shortened_profile_keeps_every_preference_model_that_its_methods_use() -> None:
    config = shortened(load_config(Path(__file__).parents[2], "tiny"))
    used = {scorer for method in config.align.values() for scorer in method.scorers}
    assert used == {"pixel", "latent"} and used <= set(config.preference_models)
