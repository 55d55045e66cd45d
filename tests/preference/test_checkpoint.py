import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from spo.errors import ModelError
from spo.preference.checkpoint import (
    PreferenceModel,
    export_published,
    import_published,
    load_clip,
    load_preference_model,
    published_name,
    read_published,
    save_preference_model,
)
from spo.preference.pixel import StepAwareCLIP
from spo.preference.preprocess import Preprocessing
from spo.preference.repository import read_processor
from spo.preference.score import PreferenceScorer
from spo.runtime import progress

State = dict[str, Tensor]


@pytest.fixture
def state(step_aware: StepAwareCLIP) -> State:
    """The step-aware model as a published state dict."""
    return {published_name(name): tensor.clone() for name, tensor in step_aware.state_dict().items()}


def assert_one_line(error: pytest.ExceptionInfo[ModelError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


# Our folders


def test_what_is_saved_is_what_is_loaded(
    preference: PreferenceModel, images: Tensor, timesteps: Tensor, tmp_path: Path
):
    preprocessing = Preprocessing(size=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), mode="published")
    save_preference_model(preference.model, preference.tokenizer, preprocessing, tmp_path / "model")
    loaded = load_preference_model(tmp_path / "model")
    assert loaded.preprocess == preprocessing
    before = PreferenceScorer(PreferenceModel(preference.model, preference.tokenizer, preprocessing))
    after = PreferenceScorer(loaded)
    prompts = ["a cat", "dog 7", "c", "d", "e"]
    assert torch.equal(after.encode(prompts), before.encode(prompts))
    assert torch.equal(
        after.score_images(images, after.encode(prompts), timesteps),
        before.score_images(images, before.encode(prompts), timesteps),
    )


def test_a_large_model_is_named_while_it_loads(
    preference: PreferenceModel,
    state: State,
    config: CLIPConfig,
    clip_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    save_preference_model(preference.model, preference.tokenizer, preference.preprocess, tmp_path / "model")
    torch.save(state, tmp_path / "published.bin")
    load: dict[str, Callable[[], object]] = {
        f"preference model {tmp_path / 'model'}": lambda: load_preference_model(tmp_path / "model"),
        f"preference model {tmp_path / 'published.bin'}": lambda: read_published(tmp_path / "published.bin", config),
        f"CLIP model '{clip_folder}'": lambda: load_clip(clip_folder),
    }
    for large, told in ((10**9, ""), (1000, "loading the {}\n")):
        monkeypatch.setattr(progress, "LARGE", large)
        for name, each in load.items():
            each()
            assert capsys.readouterr().err == told.format(name)


def test_a_folder_holds_no_pickle_and_nothing_half_written(preference: PreferenceModel, tmp_path: Path):
    save_preference_model(preference.model, preference.tokenizer, preference.preprocess, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _other_format(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "clip"}')


def _no_clip(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["clip"]
    (folder / "config.json").write_text(json.dumps(values))


def _cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "damage", [shutil.rmtree, _drop_config, _other_format, _no_clip, _cut_weights, _drop_tokenizer]
)
def test_a_damaged_folder_is_one_line(preference: PreferenceModel, tmp_path: Path, damage: Callable[[Path], None]):
    folder = tmp_path / "model"
    save_preference_model(preference.model, preference.tokenizer, preference.preprocess, folder)
    damage(folder)
    with pytest.raises(ModelError) as error:
        load_preference_model(folder)
    assert_one_line(error)
    assert "model" in str(error.value)


# The published file


def test_published_to_ours_and_back_is_the_same_file(state: State, clip_folder: Path, tmp_path: Path):
    torch.save(state, tmp_path / "published.bin")
    import_published(tmp_path / "published.bin", clip_folder, tmp_path / "ours")
    export_published(tmp_path / "ours", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_import_takes_the_clips_tokenizer_and_the_published_preprocessing(
    state: State, clip_folder: Path, tmp_path: Path
):
    (clip_folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    (clip_folder / "model.safetensors").unlink()  # the CLIP's own weights are not needed
    torch.save(state, tmp_path / "published.bin")
    import_published(tmp_path / "published.bin", clip_folder, tmp_path / "ours")
    loaded = load_preference_model(tmp_path / "ours")
    assert loaded.preprocess == Preprocessing(size=24, mean=(0.1, 0.2, 0.3), std=(1, 2, 3), mode="published")
    assert loaded.tokenizer("a cat").input_ids[-1] == loaded.model.clip.config.text_config.eos_token_id


def test_position_ids_of_older_files_are_no_weights(state: State, config: CLIPConfig, tmp_path: Path):
    older = {**state, "model.text_model.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(older, tmp_path / "published.bin")
    read_published(tmp_path / "published.bin", config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("model.t_embedder.mlp.0.bias"), "lacks model.t_embedder.mlp.0.bias"),
        (lambda state: state.update({"model.extra": torch.zeros(1)}), "has the unknown model.extra"),
        (
            lambda state: state.update({"model.visual_projection.weight": torch.zeros(3, 3)}),
            "has another shape of model.visual_projection.weight",
        ),
        (lambda state: state.update({"model.extra": "text"}), "no state dict"),
        (lambda state: state.clear(), "lacks model.logit_scale"),
    ],
    ids=["missing", "extra", "mis-shaped", "no tensor", "empty"],
)
def test_a_file_that_does_not_fit_is_one_line(
    state: State, config: CLIPConfig, tmp_path: Path, change: Callable[[dict], None], said: str
):
    change(state)
    torch.save(state, tmp_path / "published.bin")
    with pytest.raises(ModelError, match=said) as error:
        read_published(tmp_path / "published.bin", config)
    assert_one_line(error)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_file_is_refused_and_not_run(config: CLIPConfig, tmp_path: Path, write: Callable):
    write({"model.logit_scale": Malicious(tmp_path / "pwned")}, tmp_path / "published.bin")
    with pytest.raises(ModelError, match="tensors alone") as error:
        read_published(tmp_path / "published.bin", config)
    assert_one_line(error)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint at all", b"PK\x03\x04 and then nothing"])
def test_a_file_that_is_missing_or_damaged_is_one_line(config: CLIPConfig, tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "published.bin").write_bytes(content)
    with pytest.raises(ModelError, match="published") as error:
        read_published(tmp_path / "published.bin", config)
    assert_one_line(error)


# Plain CLIPs


def test_a_plain_clip_is_loaded_whole(clip: CLIPModel, clip_folder: Path, images: Tensor):
    loaded = load_clip(clip_folder)
    text = PreferenceScorer(loaded).encode(["a cat"])
    ids = loaded.tokenizer("a cat", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = clip(input_ids=ids, pixel_values=loaded.preprocess(images)).logits_per_image[:, 0]
    scores = PreferenceScorer(loaded).score_images(images, text.expand(5, -1), torch.arange(5))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_processor_lends_its_tokenizer(clip_folder: Path, tmp_path: Path):
    shutil.copytree(clip_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match="no tokenizer") as error:
        load_clip(tmp_path / "bare")
    assert_one_line(error)
    assert load_clip(tmp_path / "bare", processor=clip_folder).tokenizer("a").input_ids == [62, 26, 63]


def test_a_tokenizer_of_another_clip_is_refused(clip_folder: Path):
    path = clip_folder / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["eos_token_id"] = 5
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="ends a text with 63") as error:
        load_clip(clip_folder)
    assert_one_line(error)


@pytest.mark.parametrize("weights", ["missing", "partial", "mis-shaped", "pickled code"])
def test_unusable_weights_are_one_line(clip: CLIPModel, clip_folder: Path, tmp_path: Path, weights: str):
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    (clip_folder / "model.safetensors").unlink()
    match weights:
        case "partial":
            del state["visual_projection.weight"]
        case "mis-shaped":
            state["visual_projection.weight"] = torch.zeros(3, 3)
        case "pickled code":
            state["visual_projection.weight"] = Malicious(tmp_path / "pwned")
    if weights != "missing":
        torch.save(state, clip_folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        load_clip(clip_folder)
    assert_one_line(error)
    assert not (tmp_path / "pwned").exists()


def test_pickled_weights_are_read_where_there_are_no_others(clip: CLIPModel, clip_folder: Path):
    (clip_folder / "model.safetensors").unlink()
    torch.save(clip.state_dict(), clip_folder / "pytorch_model.bin")
    assert torch.equal(load_clip(clip_folder).model.clip.visual_projection.weight, clip.visual_projection.weight)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "bert"}'])
def test_what_is_no_clip_is_one_line(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json|CLIP") as error:
        load_clip(tmp_path)
    assert_one_line(error)


def test_no_network_is_one_line_that_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r'hf download .* models/no-such-clip .*--include "model\*.safe') as error:
        load_clip("nobody/no-such-clip")
    assert_one_line(error)


def test_a_mistyped_folder_is_one_line():
    with pytest.raises(ModelError, match="no folder here") as error:
        load_clip("data/base/no-such-folder")
    assert_one_line(error)


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("processor_config.json", {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": 2}}, (0.1, 2)),
        ("preprocessor_config.json", {"image_mean": 0.1, "image_std": [2, 2, 2]}, (0.1, 2)),
        ("processor_config.json", {"processor_class": "CLIPProcessor"}, None),
    ],
)
def test_the_normalisation_of_any_version_of_transformers_is_used(
    clip_folder: Path, file: str, values: dict[str, Any], expected: tuple[float, float] | None
) -> None:
    (clip_folder / file).write_text(json.dumps(values))
    found = read_processor(clip_folder)[2]
    usual = Preprocessing(size=24)
    assert (found.mean[0], found.std[0]) == (expected or (usual.mean[0], usual.std[0]))
    assert len(found.mean) == len(found.std) == 3


@pytest.mark.parametrize("values", [{"image_mean": [0.5]}, {"image_mean": "x"}, {"image_std": 0}, {"image_std": {}}])
def test_a_broken_normalisation_is_refused(clip_folder: Path, values: dict[str, Any]) -> None:
    (clip_folder / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"image_(mean|std) of .*; it (should be one number or three|must not be 0)"):
        read_processor(clip_folder)
