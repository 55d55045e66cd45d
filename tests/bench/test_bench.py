"""The benchmarks measure what they say: both paths do the same, and every second is counted once."""

import shutil
from pathlib import Path

import pytest
import torch

from bench import preference_kinds
from bench.flops import count
from bench.measure import Stopwatch
from bench.ours import OurPath
from bench.plain import PlainPath
from bench.profile_step import REST, SECTIONS, profile, show
from bench.spo_step import compare
from bench.systems import make_system
from experiments import figures

ROOT = Path(__file__).parents[2]


def run(path):
    pairs, losses = path.run()
    return {"pairs": {name: pairs[name] for name in ("x_t", "x_prev", "t", "t_prev")}, "losses": losses}


def test_the_published_way_and_ours_come_to_the_same_pairs_and_losses():
    plain = run(PlainPath(make_system("mini", "cpu"), seed=0))
    ours = run(OurPath(make_system("mini", "cpu", micro_batch_size=2), seed=0))
    agreement = compare(plain, ours, least=1.0)
    assert agreement["agrees"]
    assert agreement["largest_loss_difference"] < 1e-4
    assert len(plain["losses"]) == 2
    other = {**ours, "losses": [loss + 0.1 for loss in ours["losses"]]}
    assert not compare(plain, other, least=1.0)["agrees"]


def test_the_sections_of_a_profile_are_all_met_and_add_up():
    result = profile("mini")
    assert set(result["seconds"]) == {*SECTIONS, REST}
    assert all(result["seconds"][name] > 0 for name in SECTIONS)
    assert sum(result["seconds"].values()) == pytest.approx(result["total_seconds"])
    assert set(result["flops"]) == {
        "rollout: network",
        "rollout: VAE decode",
        "rollout: preference model",
        "updates: policy",
        "updates: reference",
    }
    assert "times the floor" in show(result)


def test_a_section_within_another_is_counted_once(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr("bench.measure.clock", lambda _: next(times))
    watch = Stopwatch(torch.device("cpu"))
    with watch.section("outer"), watch.section("inner"):
        pass
    assert watch.seconds == {"outer": 1.0 + 3.0, "inner": 2.0}


def test_operations_grow_with_backward_and_with_the_adapter():
    few, many = count("mini", 2), count("mini", 8)
    assert 0 < few.network == many.network
    assert 1.5 * few.network < few.network_train < many.network_train < 4 * many.network


def test_the_committed_figures_are_of_the_committed_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "experiments"
    shutil.copytree(ROOT / figures.FOLDER, folder)
    monkeypatch.setattr(figures, "FOLDER", folder)
    assert figures.main() == 0
    drawn = sorted(folder.glob("*.svg"))
    assert drawn
    for file in drawn:
        assert file.read_bytes() == (ROOT / "docs" / "experiments" / file.name).read_bytes(), f"{file.name} is stale"


@pytest.mark.slow
def test_both_kinds_of_preference_model_are_measured_on_the_same_batch() -> None:
    pixel, latent = (preference_kinds.run_one("mini", kind) for kind in preference_kinds.KINDS)
    assert pixel["pairs"] == latent["pairs"] > 0
    assert pixel["decodes"] > 0 == latent["decodes"]
    shown = preference_kinds.show({"pixel": pixel, "latent": latent}, "mini", pixel)
    assert f"| decoded images a pair | {pixel['decodes']:.3g} | 0 | 0.00 |" in shown
