"""`python -m spo check` over projects of one's own: what it finds, and that it leaves nothing behind."""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from spo.__main__ import main
from spo.commands import check_duration
from spo.commands import miniature as check
from spo.commands.architectures import network_of, preference_weights, weights
from spo.commands.disk_estimate import room
from spo.commands.miniature import forwards, miniature
from spo.config import Config, PairConfig, load_config
from spo.errors import DataError
from spo.stages import prepare
from spo.tracking import NullTracker
from spo.workspace import Workspace
from tests.test_pipeline import make_project

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("check") / "project", "sd15")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_a_sound_project_goes_through_every_stage_in_miniature_and_is_left_as_it_was(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    before = names(project)
    assert main(["check"]) == 0
    assert names(project) == before
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok  ") for line in lines[:-1])
    found = [line[6:41].strip() for line in lines[:-1]]
    stages = ["prepare", "train_preference pixel", "align spo", "evaluate", "report"]
    assert [name for name in found if name.endswith("in miniature")] == [f"{stage} in miniature" for stage in stages]
    assert found[-2:] == ["time", "memory"]
    assert "miniature of all stages" in found
    [time] = [line for line in lines if line.startswith("ok    time ")]
    stages_timed = [part.split(" ")[0] for part in time.partition("about: ")[2].split(", ")]
    assert stages_timed == ["train_preference", "align", "evaluate", "without"]
    assert lines[-1] == "profile own can run"


def test_where_the_first_pairs_are_of_one_caption_all_are_read(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(check, "PAIRS_READ", 1)
    config = load_config()
    small = miniature(config, project)
    with pytest.raises(DataError, match="none falls to"):
        prepare.run(small, root=tmp_path, tracker=NullTracker())
    check._prepare(small, config, tmp_path)
    metrics = json.loads((Workspace(small, tmp_path).prepared.folder / "metrics.json").read_text())["preferences"]
    assert metrics["train"] and metrics["validation"]


def with_setting(project: Path, section: str, **values: object) -> str:
    """The name of a profile that differs in a section's values."""
    config = yaml.safe_load((project / "configs" / "own.yaml").read_text())
    config[section] |= values
    (project / "configs" / "changed.yaml").write_text(yaml.safe_dump(config))
    return "changed"


def test_fewer_prompts_than_evaluation_asks_for_are_told_beforehand(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    asked = load_config().evaluate.num_prompts
    assert main(["check", "--quick"]) == 0
    assert "note  evaluate" not in capsys.readouterr().out
    profile = with_setting(project, "evaluate", num_prompts=1000)
    assert main(["check", "--quick", "--profile", profile]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "note  evaluate" in line]
    assert line.startswith("note  evaluate.num_prompts ") and "are test prompts, fewer than the 1000 asked for" in line
    assert asked < 1000


def test_a_missing_file_is_found_before_anything_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    profile = with_setting(project, "prepare", prompts={"source": "no.txt"})
    assert main(["check", "--profile", profile]) == 1
    out = capsys.readouterr().out
    assert "FAIL  prepare.prompts.source             no.txt does not exist" in out
    assert "in miniature" not in out
    assert out.splitlines()[-1] == "profile changed cannot run yet: repair the lines marked FAIL"


@pytest.mark.slow
def test_a_mistake_that_only_a_run_shows_is_found_by_the_miniature(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    profile = with_setting(project, "model", resolution=17)
    assert main(["check", "--profile", profile]) == 1
    assert (
        "FAIL  train_preference pixel in miniature model.resolution=17 must be a multiple of" in capsys.readouterr().out
    )


@pytest.mark.parametrize("needed", ["room", "place"])
def test_a_temporary_folder_without_room_is_found_before_anything_runs(
    needed: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    if needed == "room":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(
            check.shutil, "disk_usage", lambda place: usage(0, 0, 10**15 * ("spo-check" not in str(place)))
        )
        message = "0 bytes are free, about "
    else:
        monkeypatch.setattr(check.tempfile, "gettempdir", no_place)
        message = "No usable temporary directory"
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert line.startswith("FAIL  temporary folder")
    assert message in line and "; set TMPDIR to a folder with " in line
    assert "in miniature" not in out


def no_place() -> str:
    raise FileNotFoundError("No usable temporary directory found")


def test_a_check_of_more_than_a_minute_says_so_before_it_starts(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    said = []
    monkeypatch.setattr(check, "_run_miniature", lambda *_: said.append(capsys.readouterr().out) or True)
    for rate in (1e12, 1e3):
        monkeypatch.setattr(check_duration, "_product_rate", lambda _, rate=rate: rate)
        assert main(["check"]) == 0
    assert "miniature of all stages            about " in said[0]
    assert "this takes longer than a minute, about " in said[1]


def test_the_temporary_folder_needs_room_for_one_copy_of_each_trained_model_and_no_states(tmp_path: Path) -> None:
    small = miniature(load_config(ROOT, "sd15"), ROOT)
    needed = room(small, tmp_path, copies=1, states=0)
    models = sum(preference_weights(small.model, small.preference_models[name]) for name in small.train_preference)
    assert needed["train_preference"].kept == 4 * models
    assert needed["train_preference"].passing == 0
    assert needed["align"].passing == 4 * weights(network_of(small.model))  # diffusion_dpo's, as it is copied
    assert small.safety.save_every_seconds > 10**6


@pytest.mark.parametrize("profile", [path.stem for path in sorted((ROOT / "configs").glob("*.yaml"))])
def test_every_profile_has_a_miniature_with_the_same_models_and_samplers(profile: str) -> None:
    config = load_config(ROOT, profile)
    small = miniature(config, ROOT)
    assert (small.model, small.sampling, small.methods) == (config.model, config.sampling, config.methods)
    assert all(model.steps == 2 for model in small.preference_models.values())
    assert small.evaluate.batch_size == config.evaluate.batch_size
    for method in small.align.values():
        assert method.epochs == 2
        assert not isinstance(method, PairConfig) or method.rollouts_per_epoch == 1


def reported(*rows: dict[str, float]) -> check.Recorder:
    recorder = check.Recorder()
    for row in rows:
        recorder.log_metrics(row)
    return recorder


def test_each_stages_time_is_from_its_own_second_step_or_round(tmp_path: Path) -> None:
    small = miniature(load_config(ROOT, "tiny"), ROOT)

    def rate(stage: str, *rows: dict[str, float]) -> float:
        return check._rate(stage, small, tmp_path, reported(*rows))

    pixel = small.preference_models["pixel"]
    assert rate("train_preference pixel", {"step_seconds": 99.0}, {"step_seconds": 8.0}) == pytest.approx(
        8.0 / (pixel.batch_size * 4)
    )
    assert rate("evaluate", {"seconds_an_image": 4.0}) == 4.0 / (20 * 2)
    folder = Workspace(small, tmp_path).aligned("spo", small.training_seeds[0])
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"seconds": 50.0, "unet_forwards": 300, "rounds": 2}))
    rows = [
        {"round": number, "seconds": seconds, "unet_forwards": 150 * number}
        for number, seconds in ((1, 44.0), (2, 50.0))
    ]
    assert rate("align spo", *rows) == (50 - 44) / 150
    assert rate("align spo") == 50 / 300  # no update in the first round


def test_the_time_of_diffusion_dpo_is_told_from_the_pairs_there_are(tmp_path: Path) -> None:
    config = load_config(ROOT, "tiny").model_copy(update={"methods": ("diffusion_dpo",)})
    share = 1 - config.prepare.validation_fraction - config.prepare.test_fraction
    whole = forwards(config, ROOT, tmp_path)["align diffusion_dpo"]
    assert whole == pytest.approx(4 * config.align["diffusion_dpo"].epochs * 4608 * share)
    fewer = config.model_dump()
    fewer["prepare"]["preferences"]["max_pairs"] = 1000
    assert forwards(Config.model_validate(fewer), ROOT, tmp_path)["align diffusion_dpo"] < whole / 4


def test_the_miniature_has_as_many_pairs_at_a_time_as_the_training() -> None:
    """So that what does not fit into memory shows in the first minute."""
    sd15, tiny = (miniature(load_config(ROOT, profile), ROOT) for profile in ("sd15", "tiny"))
    assert sd15.preference_models["pixel"].batch_size == 16  # of batches of 64
    assert sd15.align["spo"].batch_size == 10  # of updates of 40 pairs
    assert tiny.align["diffusion_dpo"].batch_size == 32
    assert tiny.align["spo"].batch_size == 64  # the most that it tries, of 96
