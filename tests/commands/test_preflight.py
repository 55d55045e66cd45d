from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from spo.commands import preflight
from spo.commands.disk_estimate import room, size_of
from spo.commands.preflight import findings, require
from spo.config import Config, load_config
from spo.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> Config:
    return load_config(ROOT, "tiny")


def changed(config: Config, key: str, value: Any) -> Config:
    values = inner = config.model_dump()
    *path, last = key.split(".")
    for name in path:
        inner = inner[name]
    inner[last] = value
    return Config.model_validate(values)


def test_the_shipped_default_lacks_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert [finding for finding in findings(config, ROOT) if not finding.good] == []
    require(config, "prepare", ROOT)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "value", "said", "stage"),
    [
        ("prepare.prompts.source", "no.txt", "no.txt does not exist", "prepare"),
        ("prepare.prompts.source", "data/README.md", "of an unknown kind", "prepare"),
        ("prepare.preferences.source", "data/prompts", "is a folder of 0 files", "prepare"),
        ("prepare.preferences.source", "hub:nobody/pairs", "HF_HUB_OFFLINE forbids", "prepare"),
        ("model.path", "data/nowhere/model", "is no folder here", "align"),
        ("model.path", "data/prompts", "has no model_index.json", "align"),
        ("model.path", "nobody/no-such-model", "not in the hub's cache", "evaluate"),
        ("model.vae", "./no-vae", "is no folder here", "train_preference"),
        ("train_preference.start_from", "nowhere", "is no folder here", "train_preference"),
        ("train_preference.checkpoint", "data/prompts", "has no config.json", "train_preference"),
        ("train_preference.processor", "nowhere", "is no folder here", "train_preference"),
        ("evaluate.loras", {"theirs": "nowhere/theirs.safetensors"}, "is no folder here", "evaluate"),
        ("align.spo.scoring.tiny_vae", "nowhere", "is no folder here", "align"),
        ("evaluate.samplers", {"mine": {"scheduler": "Nothing"}}, "is no scheduler that .* use one of", "evaluate"),
        ("evaluate.samplers", {"mine": {"options": {"a": 1}}}, "unknown to DDIMScheduler; use some of", "evaluate"),
        ("launch.accelerate_config", "no.yaml", "no.yaml does not exist", "align"),
    ],
)
def test_what_is_missing_ends_its_stage_and_is_a_warning_to_the_others(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: str,
    said: str,
    stage: str,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = changed(config, key, value)
    with pytest.raises(ConfigError, match=rf"^{key}[.a-z]*: .*{said}") as raised:
        require(config, stage, ROOT)
    assert "\n" not in str(raised.value)
    require(config, "report", ROOT)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert f"will fail: {key}" in line
    assert stage in line


def test_a_needed_metrics_model_is_looked_for_and_another_one_is_not(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    clip = {"kind": "clip", "model": "nowhere"}
    config = changed(config, "evaluate.metrics", [{"kind": "oracle"}, {**clip, "name": "a"}, {**clip, "name": "b"}])
    config = changed(changed(config, "promote.tolerance", {}), "evaluate.guarded", ["a"])
    assert [finding.what for finding in findings(config, ROOT) if not finding.good] == ["evaluate.metrics.a"]


def test_a_disk_too_small_is_said_with_both_sizes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(100, 99, 1_000_000))
    config = changed(config, "prepare.preferences.source", str(ROOT / "data" / "preferences" / "tiny"))
    bad = [finding for finding in findings(config, tmp_path) if finding.what.startswith("disk")]
    stages = ("prepare", "train_preference", "align", "evaluate")
    assert [(finding.what, finding.stages) for finding in bad] == [(f"disk for {stage}", (stage,)) for stage in stages]
    assert not any(finding.good for finding in bad)
    assert all("977 KiB are free, about " in finding.detail for finding in bad)


def test_what_a_stopped_run_or_an_earlier_stage_has_written_is_not_wanted_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def needed(stage: str) -> float:
        [detail] = [found.detail for found in findings(config, tmp_path) if found.what == f"disk for {stage}"]
        number, unit = detail.split("about ")[1].split()[:2]
        return float(number) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20}[unit]

    training, evaluation = needed("train_preference"), needed("evaluate")
    state = tmp_path / config.state_folder("train_preference") / "00000001" / "tensors.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(bytes(5 * 2**20))
    assert training - needed("train_preference") == pytest.approx(5 * 2**20, abs=2**20)
    assert needed("evaluate") < evaluation  # the preference model is being made, and has taken its room


def test_files_that_another_stage_removes_meanwhile_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir()
    for name in ("stays", "goes"):
        (tmp_path / "state" / name).write_bytes(bytes(10))
    stat = Path.stat

    def gone(path: Path, **options: Any) -> Any:
        if path.name == "goes":
            raise FileNotFoundError(path)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", gone)
    assert size_of(tmp_path) == 10
    assert size_of(tmp_path / "nowhere") == 0


def test_prepare_wants_room_for_its_copy_of_the_pictures_and_for_dvcs(config: Config) -> None:
    source = ROOT / "data" / "preferences" / "tiny"
    assert room(config, ROOT)["prepare"].kept == 2 * sum(file.stat().st_size for file in source.iterdir())


def test_full_fine_tuning_needs_room_for_its_checkpoints(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def needed(config: Config) -> float:
        wanted = room(config, tmp_path)["align"]
        return wanted.kept + wanted.passing

    whole = changed(config, "align.diffusion_dpo.full_fine_tuning", True)
    checkpoints = config.align["diffusion_dpo"].checkpoints
    unet = sum(file.stat().st_size for file in (ROOT / config.model.path / "unet").iterdir())
    assert needed(config) == 0
    assert needed(whole) > 3 * checkpoints * unet  # kept, in DVC's cache too, and copied once more
    assert needed(changed(whole, "training_seeds", [0, 1])) - needed(whole) == 2 * checkpoints * unet
    hub = changed(whole, "model.path", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert needed(hub) > 3 * checkpoints * 4 * 860e6
