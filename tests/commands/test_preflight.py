from collections import namedtuple
from pathlib import Path
from typing import Any, get_args

import pytest
from huggingface_hub import constants

from spo.commands import preflight
from spo.commands.architectures import lora_weights, network_of, preference_weights, weights
from spo.commands.disk_estimate import num_pairs, room, size_of
from spo.commands.preflight import Finding, findings, require, show_findings
from spo.config import Config, MetricConfig, load_config
from spo.config.metrics import MetricSection
from spo.errors import ConfigError
from spo.workspace import Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> Config:
    """The default, under a name that has no outputs: whoever has run the pipeline here has those of `tiny`."""
    return load_config(ROOT, "tiny").model_copy(update={"profile": "unprepared"})


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
    ("key", "value", "message", "stage"),
    [
        ("prepare.prompts.source", "no.txt", "no.txt does not exist", "prepare"),
        ("prepare.prompts.source", "data/README.md", "of an unknown kind", "prepare"),
        ("prepare.preferences.source", "data/prompts", "cannot be used: .* holds no .jsonl", "prepare"),
        ("prepare.preferences.source", "hub:nobody/pairs", "HF_HUB_OFFLINE forbids", "prepare"),
        ("model.path", "data/nowhere/model", "is no folder here", "align"),
        ("model.path", "data/prompts", "has no model_index.json", "align"),
        ("model.path", "nobody/no-such-model", "not in the hub's cache", "evaluate"),
        ("model.vae", "./no-vae", "is no folder here", "train_preference"),
        ("preference_models.pixel.start_from", "nowhere", "is no folder here", "train_preference"),
        ("preference_models.pixel.checkpoint", "data/prompts", "has no config.json", "train_preference"),
        ("preference_models.pixel.processor", "nowhere", "is no folder here", "train_preference"),
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
    message: str,
    stage: str,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = changed(config, key, value)
    with pytest.raises(ConfigError, match=rf"^{key}[.a-z]*: .*{message}") as raised:
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
    assert [finding.what for finding in findings(config, ROOT) if not finding.good] == ["evaluate.metrics.a.model"]


METRICS = [
    ({"kind": "clip", "name": "mine", "model": "nowhere"}, "model: nowhere is no folder here"),
    (
        {"kind": "clip", "name": "mine", "model": "data/base/tiny-preference", "processor": "nowhere"},
        "processor: nowhere",
    ),
    ({"kind": "hpsv2", "weights": "no.pt", "clip": "data/base/tiny-preference"}, "weights: no.pt is no file here; put"),
    ({"kind": "hpsv2", "weights": "params.yaml", "clip": "nowhere"}, "clip: nowhere is no folder here"),
    (
        {"kind": "hpsv2", "weights": "data/base/hps.pt", "clip": "data/base/tiny-preference"},
        "weights: data/base/hps.pt is no file",
    ),
    ({"kind": "laion_aesthetic", "clip": "data/base/tiny-preference"}, "head: trl-lib/.* is not in the hub's cache"),
    (
        {"kind": "laion_aesthetic", "head": "params.yaml", "clip": "data/prompts"},
        "clip: data/prompts has no config.json",
    ),
    (
        {"kind": "image_reward", "tokenizer": "data/base/tiny-preference"},
        "weights: THUDM/ImageReward/.* not in the hub",
    ),
    (
        {"kind": "image_reward", "weights": "params.yaml", "tokenizer": "nowhere"},
        "tokenizer: nowhere is no folder here",
    ),
]


@pytest.mark.parametrize(("metric", "problem"), METRICS)
@pytest.mark.parametrize("use", ["primary", "guarded", "watch"])
def test_a_needed_metric_of_any_kind_must_have_its_files(
    config: Config, monkeypatch: pytest.MonkeyPatch, metric: dict[str, Any], problem: str, use: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = metric.get("name", metric["kind"])
    config = changed(config, "promote.tolerance", {})
    if use == "watch":
        watch = {"every": 1, "metric": metric, "score": name}
        unneeded = changed(config, "align.spo.watch", watch)
        config, key = changed(config, "align.spo.watch", watch | {"stop_after_worse": 2}), "align.spo.watch.metric"
    else:
        unneeded = changed(config, "evaluate.metrics", [{"kind": "oracle"}, metric])
        config, key = (
            changed(unneeded, f"evaluate.{use}", name if use == "primary" else [name]),
            f"evaluate.metrics.{name}",
        )
    assert [finding for finding in findings(unneeded, ROOT) if not finding.good] == []
    with pytest.raises(ConfigError, match=rf"^{key}.{problem}"):
        require(config, key.partition(".")[0], ROOT)


@pytest.mark.parametrize("kind", get_args(get_args(MetricConfig)[0]))
def test_every_text_in_a_metrics_settings_is_its_name_or_something_to_check(kind: type[MetricSection]) -> None:
    fields = {name for name, field in kind.model_fields.items() if field.annotation in (str, str | None)}
    assert fields - {"name"} == {*kind.models, *kind.tokenizers, *kind.files}


def test_a_disk_too_small_is_reported_with_both_sizes(
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
    state = Workspace(config, tmp_path).state("train_preference", "pixel") / "00000001" / "tensors.safetensors"
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


def test_a_latent_preference_model_needs_no_clip_and_the_room_of_half_the_base(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = config.model_copy(update={"train_preference": ("latent",), "methods": ("diffusion_dpo",)})
    latent = changed(config, "preference_models.latent", {"kind": "latent"})
    assert [finding.what for finding in findings(latent, tmp_path) if finding.what.startswith("preference_m")] == []
    count = preference_weights(latent.model, latent.preference_models["latent"])
    assert room(latent, tmp_path)["train_preference"].passing == 2 * 12 * count  # two states: weights and two moments
    for source, key in (({"checkpoint": "nowhere"}, "checkpoint"), ({"text_projection": "nowhere"}, "text_projection")):
        lacking = changed(config, "preference_models.latent", {"kind": "latent", **source})
        bad = [finding.what for finding in findings(lacking, tmp_path) if not finding.good]
        assert f"preference_models.latent.{key}" in bad


def test_a_flows_latents_are_larger_and_its_latent_model_is_three_quarters_of_the_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    flow = load_config(ROOT, "tiny-flow").model_copy(update={"train_preference": ("latent",), "methods": ("lpo",)})
    assert [finding.what for finding in findings(flow, tmp_path) if finding.what.startswith("preference_m")] == [
        "preference_models.latent.labels.model"
    ]
    count = preference_weights(flow.model, flow.preference_models["latent"])
    assert room(flow, tmp_path)["train_preference"].passing == 2 * 12 * count
    assert count == pytest.approx(weights(network_of(flow.model)) * 3 / 4, rel=0.2)
    both = [
        load_config(ROOT, profile).model_copy(update={"train_preference": ("pixel",)}) for profile in ("sd15", "sd35")
    ]
    before, after = (
        room(
            each.model_copy(
                update={"prepare": flow.prepare, "model": each.model.model_copy(update={"resolution": 64})}
            ),
            ROOT,
        )
        for each in both
    )
    more = 2 * num_pairs(flow, ROOT) * (64 / 8) ** 2 * 2 * 12  # in half precision, as the models are
    assert after["train_preference"].kept - before["train_preference"].kept == pytest.approx(more)


def test_full_fine_tuning_needs_room_for_its_checkpoints(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def needed(config: Config) -> float:
        wanted = room(config, tmp_path)["align"]
        return wanted.kept + wanted.passing

    whole = changed(config, "align.diffusion_dpo.full_fine_tuning", True)
    alone = whole.model_copy(update={"methods": ("diffusion_dpo",)})
    checkpoints = config.align["diffusion_dpo"].checkpoints
    unet = 4 * weights(network_of(config.model))
    assert needed(alone) == (3 * checkpoints + 6) * unet  # kept, in DVC's cache too, copied once more; two states
    assert needed(changed(alone, "training_seeds", [0, 1])) - needed(alone) == 2 * checkpoints * unet
    hub = changed(whole, "model.path", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert needed(hub) > 3 * checkpoints * 4 * 859.5e6


def test_a_loras_checkpoints_and_states_are_counted(config: Config, tmp_path: Path) -> None:
    sdxl = load_config(ROOT, "sdxl").model_copy(update={"methods": ("spo",)})
    lora = 4 * lora_weights(network_of(sdxl.model), sdxl.align["spo"].lora)
    assert lora == pytest.approx(372e6, rel=0.01)
    checkpoints = sdxl.align["spo"].checkpoints
    wanted = room(sdxl, tmp_path)["align"]
    assert (wanted.kept, wanted.passing) == (2 * checkpoints * lora, (checkpoints + 6) * lora)
    eight_bit = changed(sdxl, "align.spo.optimizer.eight_bit", True)
    assert room(eight_bit, tmp_path)["align"].passing == (checkpoints + 2 * 1.5) * lora
    without = sdxl.model_copy(update={"evaluate": sdxl.evaluate.model_copy(update={"num_prompts": 2})})
    assert room(without, tmp_path)["evaluate"].kept > 2 * lora  # the released LoRA, and DVC's copy


def test_a_preference_model_that_is_trained_already_is_copied_twice(config: Config, tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "model.safetensors").write_bytes(bytes(4000))
    one = config.model_copy(update={"train_preference": ("pixel",), "methods": ("spo",)})
    trained = changed(one, "preference_models.pixel.checkpoint", str(tmp_path / "trained"))
    fewer = changed(trained, "prepare.preferences.source", "nowhere")  # no latents
    wanted = room(fewer, tmp_path)["train_preference"]
    assert (wanted.kept, wanted.passing) == (2 * 4000, 0)
    named = changed(fewer, "preference_models.pixel.checkpoint", "owner/name")
    hub = changed(named, "preference_models.pixel.start_from", "yuvalkirstain/PickScore_v1")
    assert room(hub, tmp_path)["train_preference"].kept == pytest.approx(2 * 5.22e9, rel=0.01)


@pytest.mark.parametrize("kind", ["model", "data set", "file"])
def test_without_a_network_what_the_cache_lacks_is_to_be_fetched_elsewhere(
    kind: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    key, name = {
        "model": ("model.path", "nobody/model"),
        "data set": ("prepare.preferences.source", "hub:nobody/pairs"),
        "file": ("preference_models.pixel.processor", "nobody/clip"),
    }[kind]
    config, reached = changed(config, key, name), [False]
    monkeypatch.setattr(preflight, "connect", lambda: reached[0])
    [found] = [finding for finding in findings(config, ROOT) if finding.what == key]
    assert not found.good
    assert "the hub cannot be reached; fetch it where there is a network, bring the folder" in found.detail
    assert "\n" not in found.detail
    reached[0] = True
    [found] = [finding for finding in findings(config, ROOT) if finding.what == key]
    assert found.good and found.detail.endswith("will be fetched from the hub")


def test_a_tokenizers_repository_in_the_hubs_cache_needs_no_network(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = changed(config, "preference_models.pixel.processor", "nobody/clip")

    def found() -> str:
        return next(each.detail for each in findings(config, ROOT) if each.what == "preference_models.pixel.processor")

    assert "is not in the hub's cache" in found()
    (tmp_path / "models--nobody--clip" / "snapshots" / "1234").mkdir(parents=True)
    (tmp_path / "models--nobody--clip" / "snapshots" / "1234" / "vocab.json").write_text("{}")
    assert found() == "nobody/clip is in the hub's cache"


@pytest.mark.parametrize(
    ("profile", "settings"),
    [
        ("tiny", {"family": "sdxl"}),
        ("tiny", {"resolution": 4}),
        ("tiny-flow", {"t5": True, "family": "flux"}),
        ("tiny-flow", {"resolution": 128}),
    ],
)
def test_what_a_misfit_needs_is_unknown_and_no_traceback(
    profile: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shown: list[Finding] = []
    config = load_config(ROOT, profile)
    for key, value in settings.items():
        config = changed(config, f"model.{key}", value)
    show_findings(config, Path(), shown.append)
    of_memory = [finding for finding in shown if finding.what.startswith("memory for")]
    assert len(of_memory) == len(config.train_preference) + len(config.methods) + 1
    assert all("on a GPU" in each.detail or "cannot be estimated: " in each.detail for each in of_memory)
