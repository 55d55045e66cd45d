"""`python -m spo export`: what users take away, written whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spo.__main__ import main
from spo.config import LoraConfig
from spo.models.lora import add_lora, save_kohya
from spo.models.lora_file import WEIGHTS
from spo.models.policy import save_policy
from spo.preference.checkpoint import load_clip, published_name
from spo.world.pretraining.clip import new_clip, new_tokenizer, save_clip
from tests.models.tiny import RESOLUTION, make_tiny_denoiser, make_tiny_pipeline, shake

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after evaluation: a base, two checkpoints, and the choice of one."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_pipeline("sd15", root / "model")
    values = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    values["model"] = {"family": "sd15", "path": "model", "resolution": RESOLUTION}
    (root / "configs").mkdir()
    (root / "configs" / "own.yaml").write_text(yaml.safe_dump(values))
    (root / "params.yaml").write_text("profile: own\nmethods: [spo]\n")
    checkpoints = root / "runs/own/align/spo/seed-0/checkpoints"
    for seed, name in enumerate(("step-000001", "step-000002")):
        policy = make_tiny_denoiser("sd15", root / "model")
        add_lora(policy.network.module, LoraConfig(rank=2), seed=0)
        shake(policy, seed=seed)
        save_policy(policy.network, checkpoints / name)
    shutil.copytree(checkpoints / "step-000002", root / "runs/own/evaluate/lora/spo")
    return root


@pytest.fixture
def project(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    monkeypatch.setattr("spo.commands.models.set_up_libraries", lambda: None)
    return trained


def image(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": RESOLUTION, "width": RESOLUTION, "output_type": "pt"}
    return pipeline("a red house", generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize(
    ("family", "version", "architecture"),
    [
        ("sd15", "sd_v1", "stable-diffusion-v1/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("sd3", "sd3", "stable-diffusion-3/lora"),
        ("flux", "flux1", "flux-1-dev/lora"),
    ],
)
def test_a_file_for_web_user_interfaces_names_its_base(
    tmp_path: Path, family: str, version: str, architecture: str
) -> None:
    policy = make_tiny_denoiser(family, make_tiny_pipeline(family, tmp_path / "model"))
    add_lora(policy.network.module, LoraConfig(rank=2), seed=0)
    save_kohya(policy.network, tmp_path / "mine.safetensors")
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == version and metadata["modelspec.architecture"] == architecture
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"
    assert metadata["modelspec.title"] == "mine"


def test_all_formats_give_plain_diffusers_the_same_images(project: Path, tmp_path: Path) -> None:
    outs = {"diffusers": tmp_path / "lora", "kohya": tmp_path / "lora.safetensors", "merged": tmp_path / "merged"}
    images = {}
    for format, out in outs.items():
        assert main(["export", "--format", format, "--out", str(out)]) == 0
        base = out if format == "merged" else project / "model"
        pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
        images["base"] = image(DiffusionPipeline.from_pretrained(project / "model", safety_checker=None))
        if format != "merged":
            pipeline.load_lora_weights(str(out))
        images[format] = image(pipeline)
    assert (images["diffusers"] - images["base"]).abs().max() > 1e-2
    for other in ("kohya", "merged"):
        torch.testing.assert_close(images[other], images["diffusers"], atol=1e-4, rtol=1e-4)


def test_a_checkpoint_may_be_named_in_place_of_the_one_that_evaluation_chose(project: Path, tmp_path: Path) -> None:
    first = "runs/own/align/spo/seed-0/checkpoints/step-000001"
    for out, which in [("a", ["--checkpoint", first]), ("b", ["--method", "spo"]), ("c", [])]:
        options = ["--out", str(tmp_path / f"{out}.safetensors"), "--profile", "own", *which]
        assert main(["export", "--format", "kohya", *options]) == 0
    other, chosen, default = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(chosen[name], default[name]) for name in default)
    assert any(not torch.equal(chosen[name], other[name]) for name in other)


def test_a_lora_that_a_stage_wrote_is_copied_for_diffusers_without_its_base(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = project / "runs/own/evaluate/lora/spo"
    shutil.copytree(own, tmp_path / "elsewhere")  # nobody knows of this one which base it fits
    assert main(["export", "--format", "diffusers", "--checkpoint", str(tmp_path / "elsewhere"), "--out", "new"]) == 0
    loaded = load_file(project / "new" / WEIGHTS)
    shutil.rmtree(project / "new")
    monkeypatch.setattr("spo.models.load.build", lambda *_: pytest.fail("the base was loaded"))
    assert main(["export", "--format", "diffusers", "--out", str(tmp_path / "lora")]) == 0
    assert (tmp_path / "lora" / WEIGHTS).read_bytes() == (own / WEIGHTS).read_bytes()
    copied = load_file(tmp_path / "lora" / WEIGHTS)
    assert copied.keys() == loaded.keys()
    assert all(torch.equal(copied[name], loaded[name]) for name in loaded)


def test_a_lora_of_an_earlier_base_is_not_copied(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load((project / "configs" / "own.yaml").read_text())
    values["model"] = {"family": "sd15", "path": str(ROOT / "data/base/tiny"), "resolution": 64}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.yaml").write_text(yaml.safe_dump(values))
    shutil.copy(project / "params.yaml", tmp_path)
    shutil.copytree(project / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--format", "diffusers", "--out", "out"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not Path("out").exists()


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: nan(file)])
def test_a_damaged_lora_is_not_copied(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    damaged = project / "runs/own/damaged"
    shutil.copytree(project / "runs/own/evaluate/lora/spo", damaged)
    damage(damaged / WEIGHTS)
    try:
        command = ["export", "--format", "diffusers", "--checkpoint", str(damaged), "--out", str(tmp_path / "new")]
        assert main(command) == 1
    finally:
        shutil.rmtree(damaged)
    error = capsys.readouterr().err
    assert WEIGHTS in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def nan(file: Path) -> None:
    weights = load_file(file)
    save_file({**weights, min(weights): weights[min(weights)] * float("nan")}, file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "kohya", "--out", "new"], "end its name in .safetensors"),
        (["--format", "merged", "--out", "model"], "--out model exists already; remove it"),
        (
            ["--format", "diffusers", "--out", "new", "--method", "dpo"],
            "--method 'dpo' names nothing here; evaluated: ['spo']",
        ),
        (["--format", "diffusers", "--out", "new", "--checkpoint", ""], "--checkpoint '' names nothing here"),
        (["--format", "diffusers", "--out", "new", "--method", ""], "--method '' names nothing here"),
        (["--format", "diffusers", "--out", "new", "--checkpoint", "configs"], "configs holds no pytorch_lora_weights"),
        (["--format", "diffusers", "--out", "new", "--checkpoint", "params.yaml"], "no .safetensors file"),
        (["--format", "diffusers", "--out", "new", "--method", "base"], "there is nothing to export: the base"),
        (["--format", "diffusers", "--out", "new", "--profile", "nosuch"], "profile 'nosuch' has no"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(project.rglob("*"))
    assert main(["export", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(project.rglob("*")) == before


def test_before_evaluation_a_checkpoint_must_be_named(
    project: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = project / "runs/own/evaluate"
    chosen.rename(project / "elsewhere")
    try:
        assert main(["export", "--format", "diffusers", "--out", str(tmp_path / "new")]) == 1
    finally:
        (project / "elsewhere").rename(chosen)
    assert "run `python -m spo evaluate`, or name a --checkpoint" in capsys.readouterr().err


def test_a_published_preference_model_comes_in_and_goes_out_by_commands(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = new_tokenizer()
    save_clip(new_clip(tokenizer), tokenizer, tmp_path / "clip")
    ours = load_clip(tmp_path / "clip")
    state = {published_name(name): tensor for name, tensor in ours.model.state_dict().items()}
    torch.save(state, tmp_path / "published.bin")
    clip, folder, back = (str(tmp_path / name) for name in ("clip", "spm", "back.bin"))
    command = ["import-preference-model", str(tmp_path / "published.bin"), "--clip", clip, "--out", folder]
    assert main(command) == 0
    assert main(["export-preference-model", folder, "--out", back]) == 0
    again = torch.load(back, weights_only=True)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
    capsys.readouterr()
    assert main([*command[:2], "--base", "model", "--out", str(tmp_path / "new")]) == 1
    assert "name --clip for a file (.bin), or --base for a folder" in capsys.readouterr().err
    assert main(command) == 1
    assert capsys.readouterr().err == f"error: --out {folder} exists already; remove it, or name another place\n"
