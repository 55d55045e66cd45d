"""The benchmarks measure what they say: both paths do the same, and every second is counted once."""

import shutil
from pathlib import Path

import pytest
import torch

from bench import preference_kinds, profile_step, spo_step
from bench.flops import batch_flops, count, latent_flops
from bench.measure import Stopwatch
from bench.ours import OurPath
from bench.plain import PlainPath
from bench.profile_step import REST, SECTIONS, profile, show
from bench.spo_step import compare
from bench.systems import SHAPES, device_of, make_system
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


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_the_counted_operations_are_of_as_many_forwards_as_a_run_makes(kind):
    path = OurPath(make_system("mini", "cpu"), seed=0, kind=kind)
    pairs, _ = path.run()
    shape, settings, steps = SHAPES["mini"], path.settings, len(path.policy.timesteps)
    flops = count("mini", settings.lora.rank)
    if kind == "pixel":
        counted = batch_flops(shape, settings, len(pairs["t"]), steps=steps)
        del counted["rollout: preference model"]
    else:
        counted = latent_flops(shape, settings, steps=steps)
    trained, _ = counted.pop("updates: policy"), counted.pop("rollout: VAE decode", 0)
    forwards = sum(counted.values()) / flops.network + trained / flops.network_train
    assert forwards == path.metrics["unet_forwards"]


def test_a_full_size_runs_on_a_gpu_unless_the_cpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {size: (device_of(size).type, device_of(size, "cpu").type) for size in ("mini", "tiny", "sd15", "sdxl")}
    assert found == dict.fromkeys(("mini", "tiny"), ("cpu", "cpu")) | dict.fromkeys(("sd15", "sdxl"), ("cuda", "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="add --device cpu"):
        device_of("sd15")


@pytest.mark.parametrize("size", ["sd15", "sdxl"])
def test_the_benchmarks_take_the_cpu_for_a_full_size(size, monkeypatch):
    made = []

    def make(size, device, **_):
        made.append((size, device.type))
        raise KeyboardInterrupt  # before anything of that size is made

    command = ["--size", size, "--device", "cpu"]
    for module, more in ((profile_step, []), (spo_step, ["--path", "ours"]), (preference_kinds, ["--kind", "pixel"])):
        monkeypatch.setattr(module, "make_system", make)
        monkeypatch.setattr(module, "set_up_libraries", lambda: None)
        monkeypatch.setattr("sys.argv", [module.__name__, *command, *more])
        with pytest.raises(KeyboardInterrupt):
            module.main()
    assert made == 3 * [(size, "cpu")]


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
