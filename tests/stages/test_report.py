"""The report: honest in words, whole in one file, safe with any prompt."""

import csv
import html
import itertools
import json
import platform
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spo.config import Config, HpsConfig, load_config
from spo.errors import DataError
from spo.evaluation.model_variants import Task
from spo.evaluation.tables import Column, compact, comparison_rows, mean_rows, score_rows
from spo.report import cost, gallery
from spo.report.compute_saving import Spread
from spo.report.plots import LIGHT, Line, Span, interval_chart, line_chart, running_mean
from spo.report.results import Results
from spo.report.verdict import summary, verdicts
from spo.runtime.environment import git_commit, hardware, processor
from spo.runtime.text import duration
from spo.stages import report
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


def write_training(runs: Path, methods: tuple[str, ...], rng: np.random.Generator, *, seeds) -> None:
    write_metrics(runs / "prepare", {"seconds": 1.25, "train_prompts": 360})
    trained = {"seconds": 212.0, "unet_forwards": 10000, "accuracy": {"trained": {"t_1": 0.81}}}
    write_metrics(runs / "train_preference" / "pixel", trained)
    times = (1, 301, 701)
    write_csv(runs / "train_preference" / "pixel" / "accuracy.csv", [
        {"timestep": t, "model": model, "accuracy": 0.9 - t / (2000 if model == "trained" else 1500),
         "n": 200} for model in ("start", "trained") for t in times])  # fmt: skip
    write_csv(runs / "train_preference" / "pixel" / "candidates.csv", [
        {"timestep": t, "agreement": 0.8 - t / 2000, "low": 0.4, "high": 0.9, "n": 32} for t in times])  # fmt: skip
    for name, seed in itertools.product(methods, seeds):
        folder = runs / "align" / name / f"seed-{seed}"
        write_metrics(
            folder, {"seconds": 480.0, "unet_forwards": 61440, "num_examples": 2310, "kept_share": 0.56, "updates": 30}
        )
        write_csv(folder / "history.csv", [
            {"update": i + 1, "loss": "" if i == 3 else 0.69 - 0.004 * i + rng.normal(0, 0.02), "grad_norm": 0.8,
             "logit": 0.02 * i, "accuracy": 0.5 + 0.01 * i, "log_ratio_win": 0.001 * i, "log_ratio_lose": -0.002 * i,
             "clipped": 0.01 * i, "epoch": i // 8, "rollout": i, "kept": 0.5, "margin": 0.3, "score": 20 + 0.02 * i,
             "seconds": 15.0 * i, "unet_forwards": 2048 * i} for i in range(30)])  # fmt: skip
    for seed in seeds:
        write_csv(runs / "align" / "spo" / f"seed-{seed}" / "timesteps.csv", [
            {"timestep": t, "branched": 512, "kept": 300 - t // 4, "margin": 0.4 - t / 4000,
             "log_ratio_win": 0.01, "log_ratio_lose": -0.02 + t / 1e5} for t in (701, 401, 1)])  # fmt: skip


def write_evaluation(runs: Path, methods, prompts, gains, rng, *, seeds, images: int = 2) -> None:
    folder, values = runs / "evaluate", []
    wanted = [Task(i, j, prompt, 0) for i, prompt in enumerate(prompts) for j in range(images)]
    for sampler in ("ddim", "ddim-stochastic"):
        ease = rng.normal(0, 0.05, len(wanted))
        for column in ("base", "contrast", *methods):
            trained = seeds if column in methods else (None,)
            shape = (len(trained), len(wanted))
            scores = {"aesthetic": 0.5 + ease + gains[column] + rng.normal(0, 0.01, shape),
                      "alignment": 0.8 + ease + rng.normal(0, 0.01, shape),
                      "fade": 0.3 - gains[column] + np.zeros(shape)}  # fmt: skip
            scores = {key: torch.from_numpy(value) for key, value in scores.items()}
            values.append(Column(column, sampler, tuple(trained), scores))
    groups = [task.prompt for task in wanted]
    means, comparisons = (rows(values, groups, samples=200) for rows in (mean_rows, comparison_rows))
    figures = compact(means, comparisons, sampler="ddim", primary="aesthetic", guarded=("alignment",))
    figures["contrast"]["factor"] = 1.18
    facts = {"sampler": "ddim", "prompts": len(prompts), "training_seeds": len(seeds)}
    write_metrics(folder, {**facts, **figures, "seconds": 95.0})
    write_csv(folder / "means.csv", means)
    write_csv(folder / "comparisons.csv", comparisons)
    write_csv(folder / "scores.csv", score_rows(values, wanted))
    base = {"column": "base", "training_seed": "", "checkpoint": "base", "seconds": 0, "unet_forwards": 0, "chosen": 0}
    validation = [base | {"aesthetic": 0.5, "alignment": 0.8}] + [
        {"column": name, "training_seed": seed, "checkpoint": f"step-{10 * i:06d}", "seconds": 120 * i,
         "unet_forwards": 15000 * i, "chosen": int(i == 3), "aesthetic": 0.5 + gains[name] * i / 4, "alignment": 0.8}
        for name in methods for seed in seeds for i in range(1, 5)]  # fmt: skip
    write_csv(folder / "validation.csv", validation)
    names = ("column", "training_seed", "checkpoint")
    write_csv(folder / "validation_scores.csv", [
        {name: row[name] for name in names} | {"prompt_index": i, "aesthetic": row["aesthetic"] + 0.01 * (i % 3),
                                               "alignment": row["alignment"]}
        for row in validation for i in range(6)])  # fmt: skip
    Image.new("RGB", (1270, 500)).save(folder / "samples.png")
    for place in ("base", *(f"{name}/seed-{seeds[0]}" for name in methods)):
        for parent, indices in (("images", range(len(prompts))), ("other_samplers/ddim-stochastic", range(2))):
            (folder / parent / place).mkdir(parents=True)
            for task in (task for task in wanted if task.prompt_index in indices):
                pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                name = f"{task.prompt_index:04d}-{task.image_index}.png"
                Image.fromarray(pixels).save(folder / parent / place / name)


def write_runs(root: Path, methods=("spo",), *, prompts=PROMPTS, gains=GAINS, seeds=(0,)) -> Config:
    """What the stages before the report leave, for a run that never was."""
    rng = np.random.default_rng(0)
    config = load_config(Path(__file__).parents[2], "tiny")
    align = dict.fromkeys(methods, config.align["spo"])
    changes = {"methods": tuple(methods), "align": align, "training_seeds": seeds, "train_preference": ("pixel",)}
    samplers = {name: config.evaluate.samplers[name] for name in ("ddim", "ddim-stochastic")}
    changes["evaluate"] = config.evaluate.model_copy(update={"samplers": samplers})
    config = config.model_copy(update=changes)
    write_training(root / "runs/tiny", methods, rng, seeds=seeds)
    write_evaluation(root / "runs/tiny", methods, prompts, gains, rng, seeds=seeds)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    config, tracker = write_runs(root, ("spo", "dpo"), seeds=(4, 7)), Tracker()
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
    sheet, *images = Tags(page).of("img")
    assert (sheet["width"], sheet["height"]) == ("1270", "500")
    assert sheet["alt"].startswith("Samples with ddim: a row each of base, spo, dpo;")
    assert [image["alt"].split(":")[0] for image in images] == ["base", "spo", "dpo"] * (len(PROMPTS) + 2)
    assert all(image["width"] == "64" and image["class"] == "pixels" for image in images)


def test_pictures_of_another_sampler_are_there_and_hidden_at_first(page):
    cards = [attrs for attrs in Tags(page).of("li") if attrs.get("class") == "card"]
    assert [card["data-sampler"] for card in cards] == ["ddim"] * len(PROMPTS) + ["ddim-stochastic"] * 2
    assert ["hidden" in card for card in cards] == [False] * len(PROMPTS) + [True] * 2
    assert f"{len(PROMPTS)} of {len(PROMPTS)}</output>" in page


def test_the_page_says_where_its_run_is_tracked(tmp_path):
    config = write_runs(tmp_path)
    tracker = Tracker()
    tracker.address = "https://mlflow.example/#/experiments/1/runs/2"
    report.run(config, root=tmp_path, tracker=tracker)
    page = (tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")
    assert f'<a href="{tracker.address}">' in page


def test_charts_have_words_and_tables_scopes(page):
    tags = Tags(page)
    charts = [attrs for attrs in tags.of("div") if attrs.get("role") == "img"]
    assert len(charts) == len(tags.of("svg")) == 2 + 4 + 9 + 3 + 2
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


def test_samplers_are_named_and_described(page):
    for name, eta in (("ddim", 0), ("ddim-stochastic", 1)):
        assert re.search(rf"{name}\s*<span>20 steps, guidance 3, eta {eta}</span>", page)
    assert "With ddim." in page


def test_the_tables_of_another_deciding_sampler_are_refused(tmp_path):
    config = write_runs(tmp_path)
    samplers = dict(reversed(config.evaluate.samplers.items()))
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"samplers": samplers})})
    with pytest.raises(DataError, match=r"chose checkpoints with ddim, but the first .* is ddim-stochastic; run"):
        report.run(config, root=tmp_path, tracker=Tracker())


def test_a_study_is_shown_where_there_is_one(page, tmp_path):
    assert "Human study" not in page
    row = {
        "column": NASTY,
        "against": "base",
        "win_rate": 0.75,
        "low": 0.5,
        "high": 1.0,
        "ties": 1,
        "n": 8,
        "prompts": 4,
    }
    found = {"profile": "tiny", "evaluation": "of other pictures", "annotators": {"anna": 4, "ben": 4}}
    found |= {"comparisons": [row, row | {"low": None, "high": None}], "repeated": {"same": 1, "n": 2}}
    found["between"] = {"share": 0.5, "n": 4, "alpha": -0.25}
    config = write_runs(tmp_path)
    (tmp_path / "data/studies/first").mkdir(parents=True)
    (tmp_path / "data/studies/first/results.json").write_text(json.dumps(found))
    report.run(config, root=tmp_path, tracker=NullTracker())
    text = (tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")
    study = text[text.index('<section id="study"') : text.index('<section id="gallery"')]
    assert "<script>" not in study and html.escape(NASTY) in study.replace("&#34;", "&quot;")
    for words in ("75%", "50% to 100%", "2 people took part", "alpha is \N{MINUS SIGN}0.25", "made anew since"):
        assert words in study
    assert study.count("100%") == 1  # without an interval there is none


def test_chosen_checkpoints_are_told(page):
    assert "spo seed 4: step-000030; spo seed 7: step-000030; dpo seed 4: step-000030; dpo seed 7: step-000030." in page


def test_page_says_how_many_training_seeds_it_rests_on(page, tmp_path):
    seeds = "2 training seeds; the intervals cover their differences."
    assert f"Over 5 prompts never trained on, with ddim (20 steps, guidance 3, eta 0) and {seeds}" in page
    assert len(Tags(page).of("tr")) > 4
    config = write_runs(tmp_path)
    report.run(config, root=tmp_path, tracker=Tracker())
    one = (tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")
    assert "one training seed; another training may give other results than the intervals say" in one


def test_methods_are_set_against_each_other_with_intervals(page):
    assert "Method against method" in page
    assert re.search(r"Against dpo, spo is better: \+0\.1\d\d in aesthetic \(95% interval \+0\.", page)


def test_compute_saved_is_told_in_both_currencies_or_that_it_is_not_reached(page):
    assert "dpo has no checkpoint that is better than the base on validation prompts: nothing to reach." in page


def test_a_saving_is_a_number_of_the_metrics(tmp_path):
    config = write_runs(tmp_path, ("spo", "dpo"), gains=GAINS | {"dpo": 0.05})
    report.run(config, root=tmp_path, tracker=Tracker())
    folder = tmp_path / "runs/tiny/report"
    found = json.loads((folder / "metrics.json").read_text())["spo_vs_dpo"]
    expected = {"unet_forwards": 2.0, "seconds": 2.0}
    expected |= {"unet_forwards_with_preference_model": (60 + 10) / (30 + 10)}
    expected |= {"seconds_with_preference_model": (480 + 212) / (240 + 212)}
    for currency, times in expected.items():
        for end in ("", "_low", "_high"):
            assert found[f"times_less_{currency}{end}"] == pytest.approx(times, abs=1e-3)
    page = (folder / "report.html").read_text(encoding="utf-8")
    goal = "to reach dpo&#39;s best validation aesthetic (0.560, at "
    included = "UNet forwards, the preference model&#39;s training included)"
    assert f"spo needs 0.6 times the compute {goal}70,000 {included}: 40,000." in page
    assert f"spo needs 0.5 times the compute {goal}60,000 UNet forwards): 30,000. Over resampled prompts: 0.5" in page
    text = (folder / "summary.txt").read_text(encoding="utf-8")
    assert "70,000 UNet forwards, the preference model's training included" in text
    head, rest = page.split('<section id="results"')
    assert head.count(goal) == 1 and rest.count(goal) == 4


@pytest.mark.parametrize(
    ("saved", "words"), [(20.0, "1/20 of the compute"), (2.5, "0.4 times"), (1.01, "as much"), (0.4, "2.5 times")]
)
def test_a_saving_is_told_as_compute_that_is_needed(saved, words):
    assert words in cost._times(saved)


def test_what_other_prompts_might_give_is_one_sentence():
    assert cost._bounds(Spread(low=0.5, high=4.0, missed=0.0)) == " Over resampled prompts: 0.2 times to 2.0 times."
    some = " Over resampled prompts: 0.2 times to any amount; in 18% of resamples it is not reached."
    assert cost._bounds(Spread(low=0.0, high=4.0, missed=0.18)) == some
    assert cost._bounds(Spread(low=0.0, high=0.0, missed=1.0)) == " Nor do other prompts, resampled, reach it."


def test_the_verdict_speaks_of_every_sampler_and_of_what_a_duel_costs():
    rows = []
    for sampler, gain, guard in (("ddim", 0.1, -0.2), ("dpm", 0.02, 0.0)):
        for name, against, sign in (("spo", "base", 1), ("dpo", "base", 0), ("spo", "dpo", 1)):
            for metric, value in (("aesthetic", gain), ("alignment", guard)):
                rows.append(row(name, metric, against=against, difference=sign * value) | {"sampler": sampler})
    means = [
        row(column, metric, mean=0.5) | {"sampler": sampler}
        for column in ("base", "spo", "dpo") for metric in ("aesthetic", "alignment") for sampler in ("ddim", "dpm")
    ]  # fmt: skip
    found = verdicts(Results(means, rows, ("spo", "dpo"), {"ddim": "", "dpm": ""}, 128))["spo"]
    duel = next(sentence for sentence in found if sentence.startswith("Against dpo"))
    assert duel.endswith("; its alignment is lower by 0.200 (95% interval 0.150 to 0.250).")
    change = "+0.020 (95% interval -0.030 to +0.070"
    assert found[-1].startswith(f"With dpm: aesthetic shows no clear change: {change}, includes zero); alignment")
    assert found[-1].endswith(f"against dpo aesthetic is not clearly better or worse: {change}).")


def test_the_gallery_has_the_largest_gains_and_losses():
    gains = {i: (0.9 if i == 90 else -0.9 if i == 80 else 0.001 * i) for i in range(100)}
    found = gallery.chosen(list(range(100)), gains, limit=10, extremes=1)
    assert found == [0, 1, 2, 3, 4, 5, 6, 7, 80, 90]
    assert gallery.chosen(list(range(5)), gains, limit=10, extremes=1) == [0, 1, 2, 3, 4]
    assert gallery.chosen(list(range(20)), {}, limit=3, extremes=1) == [0, 1, 2]


def test_cards_carry_the_first_methods_gain(page):
    gains = [float(card["data-gain"]) for card in Tags(page).of("li") if card.get("class") == "card"]
    assert len(gains) == len(PROMPTS) + 2 and all(0.05 < gain < 0.25 for gain in gains)


def test_what_was_watched_has_its_charts(tmp_path):
    config = write_runs(tmp_path)
    write_csv(tmp_path / "runs/tiny/align/spo/seed-0/watch.csv", [
        {"round": i, "update": i, "unet_forwards": 100 * i, "preference": 20 + i, "preference_gain": i,
         "independent": 0.5 - 0.1 * i, "independent_gain": -i, "gap": 2 * i} for i in range(4)])  # fmt: skip
    tracker = Tracker()
    report.run(config, root=tmp_path, tracker=tracker)
    names = {f"plots/watch-{name}.svg" for name in ("preference-gain", "independent-gain", "gap")}
    assert names == {name for name in tracker.files if "watch" in name}
    assert "games the preference model" in (tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")


def test_a_metric_without_weights_is_named(tmp_path):
    config = write_runs(tmp_path)
    metrics = (*config.evaluate.metrics, HpsConfig())
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"metrics": metrics})})
    report.run(config, root=tmp_path, tracker=Tracker())
    page = (tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")
    assert "because of missing weights: hpsv2." in page


def contrast_ratio(one: str, other: str) -> float:
    """WCAG 2's, of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_stand_out_from_the_paper(mode):
    style = Path("spo/report/style.css").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[0 if mode == "light" else 1]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for paper in ("paper", "wash"):
        for text in ("ink", "soft", "accent", "up", "down"):
            assert contrast_ratio(colours[text], colours[paper]) >= 4.5, f"{text} on {paper}"
        for i in range(6):
            assert contrast_ratio(colours[f"series-{i}"], colours[paper]) >= 3, f"series-{i} on {paper}"
    if mode == "light":
        assert tuple(colours[f"series-{i}"] for i in range(6)) == LIGHT


def test_settings_and_stage_times_are_told(page):
    rate = load_config(Path(__file__).parents[2], "tiny").align["spo"].optimizer.learning_rate
    assert f"learning_rate: {rate}" in page
    assert "<dt>align spo (2 seeds)</dt><dd>16 min</dd>" in page


def test_the_processor_is_told(page):
    assert f"<dt>processor</dt><dd>{html.escape(hardware()['processor'])}</dd>" in page


def test_a_gpu_is_told_beside_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["A100", "A100", "L4"][i])
    assert hardware()["gpu"] == "2 x A100, 1 x L4"
    assert "processor" in hardware()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 7B13\n", "AMD EPYC 7B13"),
        ("processor\t: 0\nCPU architecture: 8\n", platform.machine()),
        ("model name\t:\n", platform.machine()),
    ],
)
def test_a_processor_that_the_system_does_not_name_is_shown_by_its_architecture(tmp_path, given, name):
    assert processor(tmp_path / "cpuinfo") == platform.machine()
    (tmp_path / "cpuinfo").write_text(given, encoding="utf-8")
    assert processor(tmp_path / "cpuinfo") == name


def test_metrics_and_charts_reach_the_tracker(made):
    folder, tracker = made
    numbers = json.loads((folder / "metrics.json").read_text())
    assert tracker.metrics == numbers
    assert numbers["pipeline_seconds"] == pytest.approx(1.25 + 212 + 4 * 480 + 95, abs=0.1)
    assert {"report.html", "summary.txt", "plots/gain-aesthetic.svg", "plots/history-loss.svg"} <= set(tracker.files)


def test_summary_is_ten_lines_at_most(made):
    lines = (made[0] / "summary.txt").read_text().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("spo raises aesthetic by 0.1")
    assert lines[1].startswith("Against dpo, spo is better: ")
    assert lines[2].startswith("dpo has no checkpoint that is better than the base")
    took = "took prepare 1.2 s, train_preference pixel 4 min, align spo (2 seeds) 16 min, align dpo (2"
    assert lines[-1].startswith(took)
    columns = ("a", "b", "c")
    means = [row(name, "aesthetic", mean=0.5) for name in ("base", *columns)]
    gains = [row(name, "aesthetic", against="base", difference=0.1) for name in columns]
    results = Results(means, gains, columns, {"ddim": ""}, 10, guarded=())
    assert len(summary(results, [], {"evaluate": 1.0}).splitlines()) <= 10


def row(column: str, metric: str, half: float = 0.05, **middle) -> dict:
    """A row of means.csv or comparisons.csv with ddim."""
    value = middle.get("mean", middle.get("difference"))
    won = {"win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8, "ties": 0, "n": 128}
    names = {"sampler": "ddim", "column": column, "metric": metric}
    return {**names, "low": value - half, "high": value + half, **won, **middle}


def results_of(gain, guard=0.0, contrast=None, over_contrast=0.0) -> Results:
    means = [row(column, metric, mean=0.5) for column in ("base", "spo") for metric in ("aesthetic", "alignment")]
    gains = [row("spo", "aesthetic", against="base", difference=gain),
             row("spo", "alignment", against="base", difference=guard)]  # fmt: skip
    if contrast is not None:
        means += [row("contrast", "aesthetic", mean=0.5)]
        gains += [row("contrast", "aesthetic", against="base", difference=contrast),
                  row("spo", "aesthetic", against="contrast", difference=over_contrast)]  # fmt: skip
    return Results(means, gains, ("spo",), {"ddim": ""}, 128, contrast_factor=1.2)


@pytest.mark.parametrize(
    ("gain", "message"),
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
def test_verdict_claims_a_change_only_where_the_interval_leaves_zero_out(gain, message):
    assert message in verdicts(results_of(gain))["spo"][0]


@pytest.mark.parametrize(
    ("guard", "message"),
    [(-0.2, "alignment with the prompt falls by 0.200"), (0.2, "rises by"), (0.01, "includes zero")],
)
def test_verdict_tells_what_became_of_alignment(guard, message):
    assert message in verdicts(results_of(0.2, guard))["spo"][1]


@pytest.mark.parametrize(
    ("over_contrast", "message"),
    [
        (0.2, "clearly less than spo"),
        (-0.3, "clearly more than spo"),
        (0.04, "not clearly less than spo: contrast may explain the gain"),
    ],
)
def test_verdict_weighs_the_gain_against_contrast_alone(over_contrast, message):
    sentence = verdicts(results_of(0.2, contrast=0.1, over_contrast=over_contrast))["spo"][2]
    assert sentence.startswith("Contrast alone (factor 1.20) moves aesthetic by +0.100 (95% interval ")
    assert message in sentence


def test_a_score_that_was_not_measured_is_no_verdict():
    found = results_of(0.2)
    with pytest.raises(DataError, match="evaluate has not measured fidelity, only aesthetic, alignment"):
        Results(found.means, found.comparisons, ("spo",), {"ddim": ""}, 128, primary="aesthetic", guarded=("fidelity",))


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("prepare/metrics.json", "prepare"),
        ("align/spo/seed-0/history.csv", "align spo --seed 0"),
        ("evaluate/scores.csv", "evaluate"),
        ("evaluate/validation_scores.csv", "evaluate"),
        ("evaluate/images/spo/seed-0/0002-0.png", "evaluate"),
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
        ("evaluate/means.csv", "", "evaluate has not measured aesthetic, alignment, only nothing"),
        ("evaluate/comparisons.csv", "", "the tables of evaluate have no spo with ddim"),
        ("evaluate/scores.csv", "column,sampler\n", "no column training_seed, prompt_index, image_index, prompt"),
        ("align/spo/seed-0/history.csv", "update,loss\n1,low\n", "history.csv line 2: could not convert"),
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
    (tmp_path / "runs/tiny/train_preference/pixel/accuracy.csv").unlink()
    (tmp_path / "runs/tiny/align/spo/seed-0/timesteps.csv").write_text("\n")
    report.run(config, root=tmp_path, tracker=Tracker())
    html = (tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")
    assert "Agreement with held-out labels" not in html and "Agreement on candidates" in html


def test_large_pictures_are_made_lighter(tmp_path):
    config = write_runs(tmp_path)
    for place in ("base", "spo/seed-0"):
        Image.new("RGB", (1024, 512)).save(tmp_path / f"runs/tiny/evaluate/images/{place}/0000-0.png")
    Image.new("RGB", (3200, 1000)).save(tmp_path / "runs/tiny/evaluate/samples.png")
    report.run(config, root=tmp_path, tracker=Tracker())
    sheet, image = Tags((tmp_path / "runs/tiny/report/report.html").read_text(encoding="utf-8")).of("img")[:2]
    assert (sheet["width"], sheet["height"]) == ("1600", "500")
    assert (image["width"], image["height"]) == ("384", "192")
    assert all(each["src"].startswith("data:image/jpeg;base64,") for each in (sheet, image))


def test_same_values_draw_the_same_chart():
    def draw():
        return interval_chart("gain", [Span("spo", 0.1, 0.05, 0.15)], x_label="gain")

    assert draw() == draw()


def test_running_mean_of_a_constant_is_that_constant_and_skips_gaps():
    assert running_mean([2.0] * 50).tolist() == [2.0] * 50
    assert running_mean([1.0, float("nan"), 1.0] * 20) == pytest.approx(np.ones(60))


def test_folder_without_git_is_told_so(tmp_path):
    assert git_commit(tmp_path) == "not in a git repository"


@pytest.mark.parametrize(
    ("seconds", "message"), [(1.234, "1.2 s"), (59.4, "59 s"), (480, "8 min"), (7260, "2 h 01 min")]
)
def test_durations_read_well(seconds, message):
    assert duration(seconds) == message
