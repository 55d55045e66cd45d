"""The report: honest in words, whole in one file, safe with any prompt."""

import csv
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spo.config import Config, load_config
from spo.environment import git_commit
from spo.errors import DataError
from spo.evaluation.plots import Line, Span, interval_chart, line_chart, running_mean
from spo.evaluation.statistics import mean_interval, paired_difference
from spo.stages import report
from spo.stages.report_results import Results, duration, headline, summary, verdicts
from spo.tracking import NullTracker

NASTY = '<script>alert(1)</script> & "quotes"'
PROMPTS = ["a red cross", "a small blue circle on a white background", NASTY, "an orange square", "a green triangle"]
GAINS = {"base": 0.0, "spo": 0.15, "dpo": 0.0, "contrast": 0.02}


class Tracker(NullTracker):
    def __init__(self):
        self.metrics, self.files = {}, {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_text(self, name, text):
        self.files[name] = text

    def log_artifact(self, path):
        self.files[path.name] = path.read_text(encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_metrics(folder: Path, metrics: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def write_training(runs: Path, methods: tuple[str, ...], rng: np.random.Generator) -> None:
    write_metrics(runs / "prepare", {"seconds": 1.25, "train_prompts": 360})
    write_metrics(runs / "train_preference", {"seconds": 212.0, "accuracy": {"trained": {"t_1": 0.81}}})
    times = (1, 301, 701)
    write_csv(runs / "train_preference" / "accuracy.csv", [
        {"timestep": t, "model": model, "accuracy": 0.9 - t / (2000 if model == "trained" else 1500),
         "n": 200} for model in ("start", "trained") for t in times])  # fmt: skip
    for name in methods:
        folder = runs / "align" / name / "seed-0"
        write_metrics(
            folder, {"seconds": 480.0, "unet_forwards": 61440, "num_pairs": 2310, "kept_share": 0.56, "updates": 30}
        )
        write_csv(folder / "history.csv", [
            {"update": i + 1, "loss": "" if i == 3 else 0.69 - 0.004 * i + rng.normal(0, 0.02), "grad_norm": 0.8,
             "logit": 0.02 * i, "accuracy": 0.5 + 0.01 * i, "log_ratio_win": 0.001 * i, "log_ratio_lose": -0.002 * i,
             "clipped": 0.01 * i, "epoch": i // 8, "rollout": i, "kept": 0.5, "margin": 0.3, "score": 20 + 0.02 * i,
             "seconds": 15.0 * i, "unet_forwards": 2048 * i} for i in range(30)])  # fmt: skip
    write_csv(runs / "align" / "spo" / "seed-0" / "timesteps.csv", [
        {"timestep": t, "branched": 512, "kept": 300 - t // 4, "margin": 0.4 - t / 4000}
        for t in (701, 401, 1)])  # fmt: skip


def write_evaluation(runs: Path, methods, prompts, gains, rng, *, images: int = 2) -> None:
    folder = runs / "evaluate"
    columns, groups = ("base", *methods, "contrast"), [i for i in range(len(prompts)) for _ in range(images)]
    rows, metrics = [], {"seconds": 95.0}
    for eta in (0.0, 1.0):
        ease = rng.normal(0, 0.05, len(groups))
        values = {column: {"aesthetic": 0.5 + ease + gains[column] + rng.normal(0, 0.01, len(groups)),
                           "alignment": 0.8 + ease + rng.normal(0, 0.01, len(groups)),
                           "fade": 0.3 - gains[column] + 0 * ease} for column in columns}  # fmt: skip
        table = metrics[f"eta_{eta:g}"] = {}
        for column, scores in values.items():
            table[column] = {key: asdict(mean_interval(v, groups, samples=500)) for key, v in scores.items()}
            if column != "base":
                table[f"{column}_vs_base"] = {
                    key: asdict(paired_difference(v, values["base"][key], groups, samples=500))
                    for key, v in scores.items()
                }
            rows += [{"column": column, "eta": eta, "prompt_index": p, "image_index": i % images, "prompt": prompts[p]}
                     | {key: v[i] for key, v in scores.items()} for i, p in enumerate(groups)]  # fmt: skip
        table["contrast"]["factor"] = 1.18
    metrics |= {"prompts": len(prompts), "images": len(groups), "checkpoint": dict.fromkeys(methods, "step-000030")}
    write_metrics(folder, metrics)
    write_csv(folder / "scores.csv", rows)
    write_csv(folder / "validation.csv", [
        {"column": "base", "checkpoint": "base", "seconds": 0, "unet_forwards": 0,
         "aesthetic": 0.5, "alignment": 0.8}] + [
        {"column": name, "checkpoint": f"step-{10 * i:06d}", "seconds": 120 * i, "unet_forwards": 15000 * i,
         "aesthetic": 0.5 + gains[name] * i / 4, "alignment": 0.8}
        for name in methods for i in range(1, 5)])  # fmt: skip
    for column in ("base", *methods):
        (folder / "images" / column).mkdir(parents=True)
        for row in rows:
            if row["column"] == column and row["eta"] == 0:
                pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                name = f"{row['prompt_index']:04d}-{row['image_index']}.png"
                Image.fromarray(pixels).save(folder / "images" / column / name)


def write_runs(root: Path, methods=("spo",), *, prompts=PROMPTS, gains=GAINS) -> Config:
    """What the stages before the report leave, for a run that never was."""
    rng = np.random.default_rng(0)
    config = load_config(Path(__file__).parents[2], "tiny")
    align = dict.fromkeys(methods, config.align["spo"])
    config = config.model_copy(update={"methods": tuple(methods), "align": align})
    write_training(root / "runs/tiny", methods, rng)
    write_evaluation(root / "runs/tiny", methods, prompts, gains, rng)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    config, tracker = write_runs(root, ("spo", "dpo")), Tracker()
    report.run(config, root=root, tracker=tracker)
    return root / "runs/tiny/report", tracker


@pytest.fixture(scope="module")
def page(made):
    return (made[0] / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.seen if name == tag]


def test_writes_exactly_its_three_files(made):
    assert sorted(path.name for path in made[0].iterdir()) == ["metrics.json", "report.html", "summary.txt"]


def test_page_asks_the_network_for_nothing(page):
    tags = Tags(page)
    sources = [attrs[key] for _, attrs in tags.seen for key in ("src", "href", "xlink:href", "srcset") if key in attrs]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not tags.of("link")
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert any("default-src 'none'" in meta.get("content", "") for meta in tags.of("meta"))


def test_prompts_are_escaped_everywhere(page):
    assert "<script>alert" not in page
    assert len(Tags(page).of("script")) == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;" in page


def test_method_names_are_escaped_in_charts_too():
    svg = line_chart(
        "x", [Line("</svg><script>$", [0, 1], [0, 1]), Line("b", [0, 1], [1, 0])], x_label="x", y_label="y"
    )
    assert "<script>" not in svg


def test_gallery_shows_every_prompt_in_every_column_with_words(page):
    images = Tags(page).of("img")
    assert [image["alt"].split(":")[0] for image in images] == ["base", "spo", "dpo"] * len(PROMPTS)
    assert all(image["width"] == "64" and image["class"] == "pixels" for image in images)


def test_charts_have_words_and_tables_scopes(page):
    tags = Tags(page)
    charts = [attrs for attrs in tags.of("div") if attrs.get("role") == "img"]
    assert len(charts) == len(tags.of("svg")) == 2 + 2 + 9 + 2 + 1
    assert all("nan" not in chart["aria-label"] and len(chart["aria-label"]) > 30 for chart in charts)
    assert all("scope" in cell for cell in tags.of("th"))


def test_ids_are_unique_over_the_whole_page(page):
    ids = [attrs["id"] for _, attrs in Tags(page).seen if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_links_within_the_page_lead_somewhere(page):
    tags = Tags(page)
    ids = {attrs["id"] for _, attrs in tags.seen if "id" in attrs}
    assert {link["href"][1:] for link in tags.of("a")} <= ids
    assert {use["xlink:href"][1:] for use in tags.of("use")} <= ids
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= ids


def test_chosen_checkpoint_is_told(page):
    assert "Chosen: spo step-000030, dpo step-000030." in page


def test_settings_and_stage_times_are_told(page):
    rate = load_config(Path(__file__).parents[2], "tiny").align["spo"].optimizer.learning_rate
    assert f"learning_rate: {rate}" in page
    assert "<dt>align spo</dt><dd>8 min</dd>" in page


def test_metrics_and_charts_reach_the_tracker(made):
    folder, tracker = made
    numbers = json.loads((folder / "metrics.json").read_text())
    assert tracker.metrics == numbers
    assert numbers["spo"]["aesthetic_gain"] == pytest.approx(0.15, abs=0.02)
    assert {"report.html", "summary.txt", "plots/gain-aesthetic.svg", "plots/history-loss.svg"} <= set(tracker.files)


def test_summary_is_ten_lines_at_most_for_up_to_three_methods(made, tmp_path):
    lines = (made[0] / "summary.txt").read_text().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("spo raises aesthetic by 0.1")
    assert lines[1].startswith("dpo shows no clear change of aesthetic")
    assert lines[-1] == "took prepare 1.2 s, train_preference 4 min, align spo 8 min, align dpo 8 min, evaluate 2 min"
    values = {"eta_0": {c: {"aesthetic": figures(0.5)} for c in ("base", "a", "b", "c")}}
    values["eta_0"] |= {f"{c}_vs_base": {"aesthetic": figures(0.1)} for c in "abc"}
    text = summary(Results(values, ("a", "b", "c"), (0.0,), 10, guarded=()), {"evaluate": 1.0})
    assert len(text.splitlines()) <= 10


def figures(middle: float, half: float = 0.05) -> dict[str, float]:
    return {"mean": middle, "difference": middle, "low": middle - half, "high": middle + half,
            "win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8}  # fmt: skip


def results_of(gain, guard=0.0, contrast=None) -> Results:
    scores = {"aesthetic": figures(0.5), "alignment": figures(0.8)}
    table = {"base": scores, "spo": scores, "spo_vs_base": {"aesthetic": figures(gain), "alignment": figures(guard)}}
    if contrast is not None:
        table |= {"contrast": {"factor": 1.2}, "contrast_vs_base": {"aesthetic": figures(contrast)}}
    return Results({"eta_0": table}, ("spo",), (0.0,), 128)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (0.2, "spo raises aesthetic by 0.200 (95% interval 0.150 to 0.250) on 128 prompts"),
        (-0.2, "spo lowers aesthetic by 0.200 (95% interval 0.150 to 0.250)"),
        (
            0.04,
            "no clear change of aesthetic over the base: +0.040, and the 95% interval -0.010 to +0.090 includes zero",
        ),
        (0.05, "includes zero"),
        (-0.05, "includes zero"),
    ],
)
def test_verdict_claims_a_change_only_where_the_interval_leaves_zero_out(gain, said):
    assert said in verdicts(results_of(gain))["spo"][0]


@pytest.mark.parametrize(
    ("guard", "said"), [(-0.2, "alignment with the prompt falls by 0.200"), (0.2, "rises by"), (0.01, "includes zero")]
)
def test_verdict_tells_what_became_of_alignment(guard, said):
    assert said in verdicts(results_of(0.2, guard))["spo"][1]


@pytest.mark.parametrize(
    ("contrast", "said"),
    [
        (0.0, "clearly less than spo"),
        (0.5, "clearly more than spo"),
        (0.15, "overlaps that of spo: contrast may explain the gain"),
    ],
)
def test_verdict_weighs_the_gain_against_contrast_alone(contrast, said):
    assert said in verdicts(results_of(0.2, contrast=contrast))["spo"][2]


def test_a_score_that_was_not_measured_is_no_verdict():
    with pytest.raises(DataError, match="evaluate has not measured fidelity, only aesthetic, alignment"):
        Results(results_of(0.2).values, ("spo",), (0.0,), 128, "aesthetic", ("fidelity",))


def test_headline_is_the_deciding_samplers(made):
    results = results_of(0.2, contrast=0.1)
    assert headline(results)["spo"]["aesthetic_gain"] == 0.2
    assert headline(results)["contrast"]["aesthetic_high"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("prepare/metrics.json", "prepare"),
        ("align/spo/history.csv", "align spo"),
        ("evaluate/scores.csv", "evaluate"),
        ("evaluate/images/spo/0002-0.png", "evaluate"),
    ],
)
def test_a_missing_file_names_the_stage_to_run(tmp_path, file, stage):
    config = write_runs(tmp_path)
    (tmp_path / "runs/tiny" / file).unlink()
    with pytest.raises(DataError, match=f"{Path(file).name} is missing; run `python -m spo {stage}`"):
        report.run(config, root=tmp_path, tracker=Tracker())
    assert not (tmp_path / "runs/tiny/report").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("evaluate/metrics.json", "{", "is no valid JSON"),
        ("evaluate/metrics.json", "[]", "holds a list"),
        ("evaluate/metrics.json", "{}", "no eta_0.base"),
        ("evaluate/scores.csv", "column,eta\n", "no column prompt_index, image_index, prompt"),
        ("align/spo/history.csv", "update,loss\n1,low\n", "history.csv line 2: could not convert"),
        ("evaluate/images/base/0000-0.png", "no picture", "is no readable picture"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, file, text, message):
    config = write_runs(tmp_path)
    (tmp_path / "runs/tiny" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        report.run(config, root=tmp_path, tracker=Tracker())


def test_a_run_without_preference_training_and_branching_has_a_report(tmp_path):
    config = write_runs(tmp_path)
    (tmp_path / "runs/tiny/train_preference/accuracy.csv").unlink()
    (tmp_path / "runs/tiny/align/spo/timesteps.csv").write_text("\n")
    report.run(config, root=tmp_path, tracker=Tracker())
    assert "Preference model</h2>" not in (tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")


def test_large_pictures_are_made_lighter(tmp_path):
    config = write_runs(tmp_path)
    for column in ("base", "spo"):
        Image.new("RGB", (1024, 512)).save(tmp_path / f"runs/tiny/evaluate/images/{column}/0000-0.png")
    report.run(config, root=tmp_path, tracker=Tracker())
    image = Tags((tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")).of("img")[0]
    assert (image["width"], image["height"]) == ("384", "192")
    assert image["src"].startswith("data:image/jpeg;base64,")


def test_same_values_draw_the_same_chart():
    def draw():
        return interval_chart("gain", [Span("spo", 0.1, 0.05, 0.15)], x_label="gain")

    assert draw() == draw()


def test_running_mean_of_a_constant_is_that_constant_and_skips_gaps():
    assert running_mean([2.0] * 50).tolist() == [2.0] * 50
    assert running_mean([1.0, float("nan"), 1.0] * 20) == pytest.approx(np.ones(60))


def test_folder_without_git_is_told_so(tmp_path):
    assert git_commit(tmp_path) == "not in a git repository"


@pytest.mark.parametrize(("seconds", "said"), [(1.234, "1.2 s"), (59.4, "59 s"), (480, "8 min"), (7260, "2 h 01 min")])
def test_durations_read_well(seconds, said):
    assert duration(seconds) == said
