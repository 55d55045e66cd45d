"""The evaluation: everything on the same prompts and seeds, choices made elsewhere, and nothing made twice."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from spo.config import Config, LoraConfig, LoraSource, ModelConfig, NetworkSource, SamplerConfig, load_config
from spo.errors import DataError, ModelError
from spo.evaluation import image_scorer
from spo.evaluation.image_scorer import ImageScorer, contrast
from spo.evaluation.model_variants import BASE, ModelVariant, checkpoints, tasks
from spo.evaluation.result_cache import ResultCache
from spo.evaluation.tables import compared
from spo.models.generate import eight_bits, from_bytes
from spo.models.lora import add_lora, save_lora
from spo.models.lora_file import WEIGHTS
from spo.runtime import distributed
from spo.runtime.files import write_json
from spo.runtime.pictures import to_picture
from spo.stages import evaluate
from spo.tracking import NullTracker
from spo.workspace import Prepared, Workspace
from spo.world.oracle import oracle_scores
from spo.world.scenes import all_scenes
from tests.models.tiny import RESOLUTION, make_tiny_denoiser, make_tiny_pipeline, shake

PROMPTS = [scene.prompt for scene in all_scenes()[::30]]
METHODS, SEEDS = ("spo", "other"), (3, 8)
TOTAL = 9 + 7 * 2 * 2  # batches: base and 8 checkpoints; base, 4 choices and 2 published, two samplers, two batches


@pytest.fixture(scope="module", autouse=True)
def few_factors():
    """Of contrast: each of them scores every picture again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_scorer, "FACTORS", (1.0, 1.5))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A project as the stages before leave it: two methods, two training seeds, two checkpoints each."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_pipeline("sd15", root / "base")
    denoiser = make_tiny_denoiser("sd15", root / "base")
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
    for i, name in enumerate(METHODS):
        for seed in SEEDS:
            for step in (2, 4):
                shake(denoiser, seed=100 * i + 10 * seed + step)
                folder = root / f"runs/tiny/align/{name}/seed-{seed}/checkpoints/step-{step:06d}"
                save_lora(denoiser.network, folder)
                write_json(folder / "cost.json", {"seconds": 1.5 * step, "unet_forwards": 100 * step, "rollouts": step})
    prompts = root / "runs/tiny/prepare/prompts"
    prompts.mkdir(parents=True)
    (prompts / "validation.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    (prompts / "test.txt").write_text("\n".join(PROMPTS[3:8]) + "\n")
    return root


@pytest.fixture(scope="module")
def config(root) -> Config:
    tiny = load_config(Path(__file__).parents[2], "tiny")
    settings = {"num_prompts": 4, "num_validation_prompts": 3, "batch_size": 3, "bootstrap_samples": 200}
    settings["samplers"] = {name: SamplerConfig(steps=2, eta=eta) for name, eta in (("ddim", 0.0), ("noisy", 1.0))}
    lora = LoraSource(source=str(root / "runs/tiny/align/other/seed-8/checkpoints/step-000004"))
    settings["loras"] = {"published": lora}
    settings["networks"] = {"network": NetworkSource(source=str(root / "base"), subfolder="unet")}
    return tiny.model_copy(
        update={
            "model": ModelConfig(family="sd15", path=str(root / "base"), resolution=RESOLUTION),
            "methods": METHODS,
            "training_seeds": SEEDS,
            "evaluate": tiny.evaluate.model_copy(update=settings),
        }
    )


class Tracker(NullTracker):
    def __init__(self):
        self.steps, self.files = {}, []

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step, {}).update(metrics)

    def log_image(self, name, image):
        self.files.append(name)

    def log_artifact(self, path):
        self.files.append(path.name)


@pytest.fixture(scope="module")
def ran(root, config):
    """A run that is killed after five batches, then the run that resumes; the number of batches of each."""
    made = []
    generate = image_scorer.generate
    with pytest.MonkeyPatch.context() as patch:

        def killed(*arguments, **options):
            if len(made) == 5:
                raise KeyboardInterrupt
            made.append(1)
            return generate(*arguments, **options)

        patch.setattr(image_scorer, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(config, root=root, tracker=Tracker())
        left = sorted(path.name for path in (root / "runs/tiny").iterdir())
        resumed = []
        patch.setattr(image_scorer, "generate", lambda *a, **o: resumed.append(1) or generate(*a, **o))
        tracker = Tracker()
        evaluate.run(config, root=root, tracker=tracker)
    return {"left": left, "made": len(made), "resumed": len(resumed), "tracker": tracker}


@pytest.fixture(scope="module")
def folder(root, ran) -> Path:
    return root / "runs/tiny/evaluate"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_killed_run_leaves_no_half_result_and_the_next_makes_what_is_missing(ran):
    assert ran["left"] == ["align", "prepare"]
    assert (ran["made"], ran["resumed"]) == (5, TOTAL - 5)


def test_every_column_has_the_same_prompts_and_every_score(folder):
    rows = read(folder / "scores.csv")
    assert list(rows[0])[:6] == ["column", "training_seed", "sampler", "prompt_index", "image_index", "prompt"]
    assert {"aesthetic", "alignment"} <= set(rows[0])
    expected = {
        ("base", ""),
        ("contrast", ""),
        ("published", ""),
        ("network", ""),
        *((name, str(seed)) for name in METHODS for seed in SEEDS),
    }
    for sampler in ("ddim", "noisy"):
        for column, seed in expected:
            own = [
                r["prompt"] for r in rows if (r["column"], r["training_seed"], r["sampler"]) == (column, seed, sampler)
            ]
            assert own == PROMPTS[3:7]
    assert len(rows) == len(expected) * 2 * 4


def test_scores_can_be_had_again_from_the_kept_images(folder):
    samplers = {row["sampler"] for row in read(folder / "scores.csv")}
    assert len(samplers) == 2
    for row in read(folder / "scores.csv"):
        kept = folder / ("images" if row["sampler"] == "ddim" else f"other_samplers/{row['sampler']}")
        place = row["column"] + (f"/seed-{row['training_seed']}" if row["training_seed"] else "")
        picture = Image.open(kept / place / f"{int(row['prompt_index']):04d}-0.png")
        pixels = torch.tensor(list(picture.tobytes()), dtype=torch.uint8).view(RESOLUTION, RESOLUTION, 3)
        again = oracle_scores(from_bytes(pixels).permute(2, 0, 1)[None], [row["prompt"]])
        assert float(row["aesthetic"]) == pytest.approx(again["aesthetic"].item(), abs=1e-3)  # there in a batch


def test_trainings_differ_and_so_do_their_images(folder):
    pictures = {
        (folder / "images" / place / "0000-0.png").read_bytes()
        for place in ("base", *(f"{name}/seed-{seed}" for name in METHODS for seed in SEEDS))
    }
    assert len(pictures) == 5


def test_anothers_lora_is_a_column_of_its_own_pictures(folder, root, config):
    made = ImageScorer(config, root)
    images = tasks(Workspace(config, root).prepared, "test", 4, 1, config.evaluate.seed)
    own = ModelVariant("other", 8, root / "runs/tiny/align/other/seed-8/checkpoints/step-000004")
    [first, _] = made.batches(own, images, "ddim", split="test", images=True)
    shown = Image.open(folder / "images/published/0000-0.png")
    assert to_picture(from_bytes(first.images[0])).tobytes() == shown.tobytes()


def test_one_checkpoint_a_training_is_chosen_on_validation_prompts_and_one_a_method_released(folder, root):
    rows = read(folder / "validation.csv")
    assert len(rows) == 9
    for name in METHODS:
        own = [row for row in rows if row["column"] == name]
        assert sorted(row["training_seed"] for row in own if row["chosen"] == "1") == ["3", "8"]
        released = json.loads((folder / "metrics.json").read_text())[name]["released"]
        seed, step = released.split("/")
        assert {"training_seed": seed.removeprefix("seed-"), "checkpoint": step}.items() <= next(
            row for row in own if row["chosen"] == "1" and row["training_seed"] == seed.removeprefix("seed-")
        ).items()
        source = root / f"runs/tiny/align/{name}/{seed}/checkpoints/{step}" / WEIGHTS
        assert (folder / "lora" / name / WEIGHTS).read_bytes() == source.read_bytes()


def test_every_claim_has_its_interval_and_counts_its_seeds(folder):
    rows = read(folder / "comparisons.csv")
    pairs = list(dict.fromkeys((row["column"], row["against"]) for row in rows))
    others = ("published", "network")
    assert set(pairs) == {
        *((column, "base") for column in ("contrast", *METHODS, *others)),
        *((column, "contrast") for column in (*METHODS, *others)),
        ("spo", "other"), ("published", "network"),
        *itertools.product(METHODS, others),
    }  # fmt: skip
    of_base = [row for row in rows if (row["column"], row["against"]) == ("network", "base")]
    assert {float(row["difference"]) for row in of_base} == {0.0}  # it is the base's own network
    for row in rows:
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert 0 <= float(row["win_rate_low"]) <= float(row["win_rate"]) <= float(row["win_rate_high"]) <= 1
        trained = {row["column"], row["against"]} & set(METHODS)
        assert row["training_seeds"] == ("2" if trained else "0")
    mean = next(row for row in read(folder / "means.csv") if row["column"] == "spo")
    assert (mean["n"], mean["training_seeds"]) == ("8", "2")


def test_metrics_are_few_and_equal_the_tables(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {
        "prompts",
        "images",
        "training_seeds",
        "base",
        "contrast",
        "spo",
        "published",
        "spo_vs_other",
        "seconds",
    } <= (set(metrics))
    assert metrics["contrast"]["factor"] in image_scorer.FACTORS
    row = next(
        row
        for row in read(folder / "comparisons.csv")
        if (row["column"], row["against"], row["metric"], row["sampler"]) == ("spo", "other", "aesthetic", "ddim")
    )
    assert metrics["spo_vs_other"]["aesthetic_difference"] == pytest.approx(float(row["difference"]), abs=1e-5)


def test_curves_tables_and_pictures_reach_the_tracker(ran):
    tracker = ran["tracker"]
    assert set(tracker.files) == {"samples", *evaluate.TABLES}
    assert "aesthetic" in tracker.steps[200]["validation.spo.seed_3"]
    assert "aesthetic" in tracker.steps[0]["validation.base"]


def test_processes_share_the_batches_of_all_variants(root, config, ran, tmp_path, monkeypatch):
    variants = [ModelVariant(BASE), *checkpoints(config, "spo", 3, root), *checkpoints(config, "other", 8, root)]
    asked = tasks(Prepared(root / "runs/tiny/prepare"), "validation", 3, 1, config.evaluate.seed)
    made = []
    generate = image_scorer.generate
    monkeypatch.setattr(image_scorer, "generate", lambda *a, **o: made.append(1) or generate(*a, **o))
    cache = ResultCache(tmp_path)
    for rank, own in ((0, 3), (1, 2)):
        with monkeypatch.context() as patch:
            for name, value in (("count", 2), ("rank", rank), ("wait", None)):
                patch.setattr(distributed, name, lambda value=value: value)
            scorer = ImageScorer(config, root)
            scorer.cache = cache
            scorer.share(variants, asked, "ddim", split="validation", images=False)
        assert len(made) == own
        made.clear()
    scorer = ImageScorer(config, root)
    expected = [scorer.scores(each, asked, "ddim", split="validation") for each in variants]
    scorer.cache = cache
    found = [scorer.scores(each, asked, "ddim", split="validation") for each in variants]
    assert not made
    assert all(torch.equal(a["aesthetic"], b["aesthetic"]) for a, b in zip(expected, found, strict=True))


def test_the_sheet_of_samples_goes_from_the_largest_loss_of_the_first_method_to_its_largest_gain(folder, config):
    rows = [row for row in read(folder / "scores.csv") if row["sampler"] == "ddim"]
    score = {
        (row["column"], row["training_seed"], int(row["prompt_index"])): float(row["aesthetic"])
        for row in rows
        if row["image_index"] == "0"
    }
    gains = [score["spo", "3", i] - score[BASE, "", i] for i in range(4)]
    order = sorted(range(4), key=gains.__getitem__)
    assert order != list(range(4))
    sheet = Image.open(folder / "samples.png").convert("RGB")
    shown = [Image.open(folder / f"images/{BASE}/{i:04d}-0.png") for i in order]
    tiles = [picture.resize((112, 112), Image.Resampling.NEAREST) for picture in shown]
    left, top = sheet.width - 16 - 4 * 112 - 3 * 8, sheet.height - 16 - 3 * 112 - 2 * 8
    for x, tile in enumerate(tiles):
        found = sheet.crop((left + x * 120, top, left + x * 120 + 112, top + 112))
        assert found.tobytes() == tile.tobytes()


def test_what_is_finished_is_not_made_again_and_a_new_checkpoint_costs_its_own_batches(
    folder, root, config, monkeypatch
):
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    monkeypatch.setattr(image_scorer, "build", lambda *_: pytest.fail("no model is needed"))
    evaluate.run(config, root=root, tracker=NullTracker())
    assert {path.name: path.read_bytes() for path in folder.glob("*.csv")} == before
    monkeypatch.undo()

    made = []
    generate = image_scorer.generate
    monkeypatch.setattr(image_scorer, "generate", lambda *a, **o: made.append(1) or generate(*a, **o))
    changed = config.model_copy(update={"training_seeds": (3,), "methods": ("spo",)})
    align = root / "runs/tiny/align"
    shutil.copytree(align / "other/seed-8/checkpoints/step-000004", align / "spo/seed-3/checkpoints/step-000006")
    kept = cache_size(root)
    evaluate.run(changed, root=root, tracker=NullTracker())
    assert 1 <= len(made) <= 1 + 4  # scored on validation prompts, and on test prompts if it is chosen
    assert cache_size(root) < kept  # what the last run did not need is gone


def test_a_renamed_sampler_redoes_nothing_and_a_changed_one_its_own_images(folder, root, config, monkeypatch):
    images = tasks(Workspace(config, root).prepared, "test", 3, 1, config.evaluate.seed)

    def made(**samplers: SamplerConfig) -> int:
        calls = []
        with monkeypatch.context() as patch:
            generate = image_scorer.generate
            patch.setattr(image_scorer, "generate", lambda *a, **o: calls.append(1) or generate(*a, **o))
            settings = config.evaluate.model_copy(update={"samplers": samplers})
            scorer = ImageScorer(config.model_copy(update={"evaluate": settings}), root)
            for name in samplers:
                scorer.scores(ModelVariant(BASE), images, name, split="test")
        return len(calls)

    own = SamplerConfig(steps=2, eta=0.5)
    assert made(first=own) == 1
    assert made(second=own) == 0
    for change in ({"steps": 3}, {"guidance_scale": 4.0}, {"eta": 0.4}, {"options": {"timestep_spacing": "trailing"}}):
        assert made(second=own.model_copy(update=change)) == 1
    assert made(second=SamplerConfig(scheduler="DDPMScheduler", steps=2)) == 1


def cache_size(root: Path) -> int:
    return len(list((root / ".cache/evaluate/tiny").glob("*.safetensors")))


def test_from_nothing_the_figures_are_those_of_the_killed_run(ran, root, config, tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(root / "runs/tiny/prepare", copy / "runs/tiny/prepare")
    shutil.copytree(root / "runs/tiny/align/other", copy / "runs/tiny/align/other")
    one = {"ddim": config.evaluate.samplers["ddim"]}
    settings = config.evaluate.model_copy(update={"samplers": one, "loras": {}})
    small = config.model_copy(update={"methods": ("other",), "training_seeds": (8,), "evaluate": settings})
    for folder in (root, copy):
        evaluate.run(small, root=folder, tracker=NullTracker())
    assert (copy / "runs/tiny/evaluate/scores.csv").read_bytes() == (
        root / "runs/tiny/evaluate/scores.csv"
    ).read_bytes()


def test_the_control_is_the_contrast_with_the_highest_mean(root, config):
    made = ImageScorer(config, root)
    images = tasks(Workspace(config, root).prepared, "test", 4, 1, 7)
    batches = list(made.batches(ModelVariant(BASE), images, "ddim", split="test", images=True))
    factor, scores = made.best_contrast(batches)
    means = {
        each: torch.cat(
            [
                oracle_scores(
                    eight_bits(contrast(from_bytes(batch.images), each)), [task.prompt for task in batch.tasks]
                )["aesthetic"]
                for batch in batches
            ]
        ).mean()
        for each in image_scorer.FACTORS
    }
    assert means[factor] == max(means.values())
    assert scores["aesthetic"].mean() == pytest.approx(means[factor].item())


def test_a_damaged_entry_is_made_anew(root, config, monkeypatch):
    images = tasks(Workspace(config, root).prepared, "test", 2, 1, 11)
    made = ImageScorer(config, root)
    [batch] = made.batches(ModelVariant(BASE), images, "ddim", split="test", images=True)
    (made.cache.folder / f"{batch.key}.safetensors").write_bytes(b"half")
    [again] = made.batches(ModelVariant(BASE), images, "ddim", split="test", images=True)
    assert torch.equal(again.images, batch.images)
    assert to_picture(from_bytes(again.images[0])).size == (RESOLUTION, RESOLUTION)


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("prepare/prompts/test.txt", DataError, "run `python -m spo prepare`"),
        ("align/spo/seed-8/checkpoints", ModelError, "run `python -m spo align spo --seed 8`"),
    ],
)
def test_what_is_missing_is_named_with_its_stage(root, config, tmp_path, missing, error, message):
    for name in ("prepare", "align"):
        shutil.copytree(root / "runs/tiny" / name, tmp_path / "runs/tiny" / name)
    path = tmp_path / "runs/tiny" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(error, match=message):
        evaluate.run(config, root=tmp_path, tracker=NullTracker())
    assert not (tmp_path / "runs/tiny/evaluate").exists()


def test_comparisons_are_those_that_a_reader_asks_for():
    assert compared(["base", "contrast", "a", "b"]) == [
        ("contrast", "base"), ("a", "base"), ("b", "base"),
        ("a", "b"), ("a", "contrast"), ("b", "contrast")]  # fmt: skip
    assert compared(["base", "a"]) == [("a", "base")]


def test_fewer_prompts_than_asked_for_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = Prepared(tmp_path)
    prepared.prompts_file("test").parent.mkdir()
    prepared.prompts_file("test").write_text("a\nb\nc\n")
    assert len(tasks(prepared, "test", 3, 2, 0)) == 6
    assert capsys.readouterr().err == ""
    assert len(tasks(prepared, "test", 500, 1, 0)) == 3
    assert "test.txt holds 3 prompts, not the 500 that are asked for; all of them are" in capsys.readouterr().err
