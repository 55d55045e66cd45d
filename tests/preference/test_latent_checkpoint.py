import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from spo.errors import ModelError
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.checkpoint import PreferenceModel, load_preference_model, save_preference_model
from spo.preference.latent_checkpoint import LatentPreference, load_latent_preference, save_latent_preference
from spo.preference.latent_published import HEADS, read_published_latent, write_published_latent
from spo.preference.latent_score import LatentScorer
from tests.models.tiny import DIFFUSION
from tests.preference.latents import PROMPTS, latents, make_base, make_preference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module", params=DIFFUSION)
def base(request: pytest.FixtureRequest, folder: Path) -> LatentDiffusion:
    return make_base(request.param, folder / request.param)


@pytest.fixture(scope="module")
def preference(base: LatentDiffusion) -> LatentPreference:
    return make_preference(base, guidance_scale=5.0, num_guided=2)


def scores(preference: LatentPreference) -> torch.Tensor:
    scorer = LatentScorer(preference)
    return scorer.score_latents(latents(3), torch.tensor([1, 401, 951]), scorer.encode(PROMPTS))


def assert_one_line(error: pytest.ExceptionInfo[ModelError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


# Our folders


def test_what_is_saved_is_what_is_loaded(preference: LatentPreference, tmp_path: Path):
    save_latent_preference(preference, tmp_path / "model")
    loaded = load_latent_preference(tmp_path / "model")
    torch.testing.assert_close(scores(loaded), scores(preference), rtol=1e-5, atol=1e-5)
    assert (loaded.space, loaded.family) == (preference.space, preference.family)
    for name in ("guidance_scale", "num_guided", "image_size"):
        assert getattr(loaded.model, name) == getattr(preference.model, name)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_loading_draws_no_random_weights(preference: LatentPreference, tmp_path: Path):
    save_latent_preference(preference, tmp_path / "model")
    before = torch.get_rng_state()
    loaded = load_latent_preference(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in (*loaded.model.parameters(), *loaded.model.buffers()))


def test_a_folder_holds_no_pickle_no_path_and_nothing_half_written(
    preference: LatentPreference, folder: Path, tmp_path: Path
):
    save_latent_preference(preference, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert str(folder) not in (tmp_path / "model" / "config.json").read_text()


def _without(name: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        del values[name]
        (folder / "config.json").write_text(json.dumps(values))

    return drop


def _cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _other_width(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["projection_size"] = 5
    (folder / "config.json").write_text(json.dumps(values))


def _drop_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()


@pytest.mark.parametrize(
    "damage",
    [shutil.rmtree, _without("unet"), _without("family"), _without("text_encoders"), _cut_weights, _other_width,
     _drop_tokenizer],
)  # fmt: skip
def test_a_damaged_folder_is_one_line(preference: LatentPreference, tmp_path: Path, damage: Callable[[Path], None]):
    save_latent_preference(preference, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelError, match="model") as error:
        load_latent_preference(tmp_path / "model")
    assert_one_line(error)


def test_each_kind_of_folder_is_read_by_its_own_reader(
    preference: LatentPreference, request: pytest.FixtureRequest, tmp_path: Path
):
    pixel: PreferenceModel = request.getfixturevalue("preference_of_pixels")
    save_latent_preference(preference, tmp_path / "latent")
    save_preference_model(pixel.model, pixel.tokenizer, pixel.preprocess, tmp_path / "pixel")
    with pytest.raises(ModelError, match="kind 'latent', not 'pixel'"):
        load_preference_model(tmp_path / "latent")
    with pytest.raises(ModelError, match="kind 'pixel', not 'latent'"):
        load_latent_preference(tmp_path / "pixel")


@pytest.fixture
def preference_of_pixels(step_aware, tokenizer) -> PreferenceModel:
    from spo.preference.preprocess import Preprocessing

    return PreferenceModel(step_aware, tokenizer, Preprocessing(size=24))


# The published layout


def read(preference: LatentPreference, source: Path, folder: Path) -> LatentPreference:
    return read_published_latent(source, folder / preference.family, guidance_scale=5.0, num_guided=2)


def test_what_is_written_as_published_is_read_again(preference: LatentPreference, folder: Path, tmp_path: Path):
    write_published_latent(preference, tmp_path / "published")
    again = read(preference, tmp_path / "published", folder)
    assert again.model.image_size == preference.model.image_size
    assert again.space is not None and preference.space is not None
    assert again.space.probe == pytest.approx(preference.space.probe, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(scores(again), scores(preference), rtol=1e-5, atol=1e-5)


def test_the_published_code_finds_what_it_loads(preference: LatentPreference, folder: Path, tmp_path: Path):
    """A whole UNet, encoders under their older names, and a pickle of tensors and a number."""
    write_published_latent(preference, tmp_path / "published")
    _, report = UNet2DConditionModel.from_pretrained(tmp_path / "published" / "unet", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    names = load_file(tmp_path / "published" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    state = torch.load(tmp_path / "published" / HEADS, weights_only=True)
    projections = ["visual_projection"] + ["text_projection"] * (preference.family == "sd15")
    assert list(state) == [*projections, "logit_scale"]
    assert isinstance(state["logit_scale"], float)
    for path in (tmp_path / "published").rglob("config.json"):
        assert str(folder) not in path.read_text()


@pytest.mark.parametrize("scale", [2.5, torch.tensor(2.5), torch.tensor([2.5], dtype=torch.float64)])
def test_the_logit_scale_is_a_number_or_a_tensor(
    preference: LatentPreference, folder: Path, tmp_path: Path, scale: float | torch.Tensor
):
    write_published_latent(preference, tmp_path / "published")
    state = torch.load(tmp_path / "published" / HEADS, weights_only=True)
    torch.save({**state, "logit_scale": scale}, tmp_path / "published" / HEADS)
    assert read(preference, tmp_path / "published", folder).model.logit_scale.item() == 2.5


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state, _: state.pop("visual_projection"), "lacks visual_projection.weight"),
        (lambda state, _: state.pop("logit_scale"), "lacks logit_scale"),
        (
            lambda state, _: state.update(visual_projection={"weight": torch.zeros(32, 7)}),
            "UNet of 160 features.* another shape of visual_projection.weight",
        ),
        (lambda state, _: state.update(more={"weight": torch.zeros(1)}), "unknown more.weight"),
        (lambda state, _: state.update(logit_scale=float("nan")), "no usable numbers in logit_scale"),
        (lambda state, _: state.update(logit_scale="2"), "no tensor under logit_scale"),
        (lambda state, path: state.update(more=Malicious(path)), "no code of it was run"),
    ],
    ids=["no projection", "no scale", "another width", "more", "nan", "text", "code"],
)
def test_a_pickle_that_does_not_fit_is_one_line(
    preference: LatentPreference, folder: Path, tmp_path: Path, change: Callable, said: str
):
    write_published_latent(preference, tmp_path / "published")
    state = torch.load(tmp_path / "published" / HEADS, weights_only=True)
    change(state, tmp_path / "pwned")
    torch.save(state, tmp_path / "published" / HEADS)
    with pytest.raises(ModelError, match=said) as error:
        read(preference, tmp_path / "published", folder)
    assert_one_line(error)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "unet is missing"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder is missing"),
        (lambda folder: (folder / HEADS).unlink(), f"{HEADS} is missing"),
        (lambda folder: (folder / HEADS).write_bytes(b"no pickle"), f"{HEADS} cannot be read"),
        (
            lambda folder: os.truncate(folder / "unet" / "diffusion_pytorch_model.safetensors", 999),
            "unet cannot be read",
        ),
        (lambda folder: os.truncate(folder / "text_encoder" / "model.safetensors", 999), "text_encoder cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    preference: LatentPreference, folder: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
):
    write_published_latent(preference, tmp_path / "published")
    damage(tmp_path / "published")
    with pytest.raises(ModelError, match=said) as error:
        read(preference, tmp_path / "published", folder)
    assert_one_line(error)


def test_a_base_that_is_not_there_is_one_line(preference: LatentPreference, tmp_path: Path):
    write_published_latent(preference, tmp_path / "published")
    with pytest.raises(ModelError, match="no folder here") as error:
        read(preference, tmp_path / "published", tmp_path / "nowhere")
    assert_one_line(error)
