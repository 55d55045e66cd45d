"""Pictures for the user: of the model that was named, from the seed that was given, saying how they were made."""

from pathlib import Path

import pytest
from PIL import Image

from spo import tracking
from spo.config import Config, LoraConfig, ModelConfig, load_config
from spo.errors import ConfigError, ModelError
from spo.evaluation.resolve_model import lora_within, resolve_model
from spo.evaluation.sample_images import Painter, choose_sampler
from spo.models.lora import add_lora, save_lora
from spo.models.lora_file import WEIGHTS
from spo.runtime.pictures import labelled_sheet, row_sheet
from tests.models.tiny import RESOLUTION, make_tiny_denoiser, make_tiny_pipeline, shake

PROMPT = "a red cross <&> ünïcode"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A project with a random base and one evaluated method."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_pipeline("sd15", root / "base")
    denoiser = make_tiny_denoiser("sd15", root / "base")
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
    shake(denoiser)
    save_lora(denoiser.network, root / "runs/tiny/evaluate/lora/spo")
    return root


@pytest.fixture(scope="module")
def config(root) -> Config:
    tiny = load_config(Path(__file__).parents[2], "tiny")
    model = ModelConfig(family="sd15", path=str(root / "base"), resolution=RESOLUTION)
    return tiny.model_copy(update={"model": model, "methods": ("spo",)})


@pytest.fixture(scope="module")
def sampler(config):
    return choose_sampler(config, None, steps=2, guidance=None, eta=None)


@pytest.fixture(scope="module")
def made(root, config, sampler, tmp_path_factory):
    """Both commands' files: two pictures of the method, and two seeds side by side with the base."""
    out = tmp_path_factory.mktemp("pictures")
    shared = {"seed": 7, "num": 2, "sampler": sampler, "root": root}
    one = Painter(config, PROMPT, out=out / "one", **shared).paint(None)
    return one, Painter(config, PROMPT, out=out / "two", **shared).compare([])


def test_a_picture_says_how_it_was_made(made, config):
    facts = Image.open(made[0][1]).text
    assert facts["prompt"] == PROMPT
    assert {
        "seed": "8",
        "sampler": "ddim",
        "scheduler": "DDIMScheduler",
        "steps": "2",
        "guidance": "3.0",
        "eta": "0.0",
        "base": config.model.path,
    }.items() <= facts.items()
    assert facts["model"].startswith("spo, the LoRA in ")
    assert facts["commit"]


def test_the_same_seed_is_the_same_picture_in_both_commands_and_the_lora_changes_it(made):
    one, sheet = made
    files = {path.name: Image.open(path).tobytes() for path in sheet.parent.iterdir() if path != sheet}
    assert len(files) == 4
    base, spo = (files[f"a-red-cross-ünïcode-{name}-8.png"] for name in ("base", "spo"))
    assert spo == Image.open(one[1]).tobytes() != base


def test_the_sheet_holds_a_column_a_model_and_a_row_a_seed(made):
    sheet = Image.open(made[1])
    assert sheet.width >= 2 * 256
    assert sheet.height >= 2 * 256
    assert sheet.text["seed"] == "7, 8"


def test_a_title_of_any_length_fits_its_sheet():
    picture = Image.new("RGB", (300, 300))
    words = "a long prompt " * 30
    sheet = labelled_sheet(words + "x" * 300, {"one": [picture]}, ["seed 0"])
    assert sheet.width == 300 + 32
    assert sheet.height > 300 + 26 * 10


@pytest.mark.parametrize(("size", "shown"), [((64, 64), (128, 128)), ((1024, 512), (256, 128))])
def test_a_sheet_of_rows_shows_small_pictures_enlarged_and_large_ones_reduced(size, shown):
    rows = {name: [Image.new("RGB", size, colour)] * 2 for name, colour in (("base", "#ff0000"), ("spo", "#0000ff"))}
    sheet = row_sheet(rows, "a title " * 40, ["-0.1", "+0.1"])
    left, top = sheet.width - 16 - 2 * shown[0] - 8, sheet.height - 16 - 2 * shown[1] - 8
    for x in range(2):
        for y, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
            corner = (left + x * (shown[0] + 8), top + y * (shown[1] + 8))
            tile = sheet.crop((*corner, corner[0] + shown[0], corner[1] + shown[1]))
            assert tile.getcolors() == [(shown[0] * shown[1], colour)]


def test_nothing_is_evaluated_yet_means_the_base(config, tmp_path):
    source = resolve_model(None, config, tmp_path)
    assert (source.name, source.lora) == ("base", None)
    assert "no evaluated LoRA yet" in source.description


@pytest.mark.parametrize("wanted", ["spo", "runs/tiny", "runs/tiny/evaluate", f"runs/tiny/evaluate/lora/spo/{WEIGHTS}"])
def test_a_method_a_run_and_a_file_name_the_same_weights(config, root, monkeypatch, wanted):
    monkeypatch.chdir(root)
    lora = Path(resolve_model(wanted, config).lora)
    assert (lora if lora.is_file() else lora / WEIGHTS).samefile(root / f"runs/tiny/evaluate/lora/spo/{WEIGHTS}")


def test_a_training_runs_folder_means_its_last_checkpoint(tmp_path):
    for step in (3, 12, 6):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / WEIGHTS).touch()
    assert lora_within(tmp_path).name == "step-000012"


def test_a_registered_model_is_fetched_through_tracking(config, root, monkeypatch):
    asked = []
    monkeypatch.setattr(tracking, "fetch_model", lambda uri, project: asked.append(uri) or root / "runs/tiny/evaluate")
    source = resolve_model("models:/spo-lora@champion", config, root)
    assert asked == ["models:/spo-lora@champion"]
    assert source.name == "spo-lora@champion"
    assert (Path(source.lora) / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("nosuch", r"names nothing here; evaluated: \['spo'\]"),
        ("runs/nosuch", "names nothing here"),
        ("base-folder", "holds no pytorch_lora_weights"),
        ("two", "holds 2 LoRAs; name one of them"),
    ],
)
def test_a_name_of_nothing_is_answered_with_what_there_is(config, root, tmp_path, monkeypatch, wanted, message):
    (tmp_path / "base-folder").mkdir()
    for name in ("two/a", "two/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / WEIGHTS).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        resolve_model(wanted, config, root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"num": 0}, "makes no picture"),
        ({"seed": -1}, "out of range"),
        ({"out": Path("x.png"), "num": 2}, "name a folder"),
        ({"out": Path(__file__)}, "is a file; name a folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(config, sampler, root, change, message):
    options = {"prompt": PROMPT, "seed": 0, "num": 1, "out": Path("pictures"), **change}
    with pytest.raises(ConfigError, match=message):
        Painter(config, **options, sampler=sampler, root=root).paint(None)


def test_a_base_alone_cannot_be_compared(config, sampler, tmp_path):
    with pytest.raises(ConfigError, match="nothing to compare"):
        Painter(config, PROMPT, seed=0, num=1, out=tmp_path / "out", sampler=sampler, root=tmp_path).compare([])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"guidance": 0.5}, {"eta": 2.0}])
def test_a_sampler_out_of_range_is_refused(config, wrong):
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        choose_sampler(config, None, **{"steps": None, "guidance": None, "eta": None, **wrong})


def test_a_named_sampler_keeps_its_settings_but_those_that_are_given(config):
    given = {"steps": None, "guidance": None, "eta": None}
    own = config.evaluate.samplers["ddim-stochastic"]
    assert choose_sampler(config, "ddim-stochastic", **given)[1] == own
    changed = choose_sampler(config, "ddim-stochastic", **given | {"steps": 7})[1]
    assert changed == own.model_copy(update={"steps": 7})
    with pytest.raises(
        ConfigError, match=r"'ddpm' is not in evaluate.samplers; use one of \['ddim', 'ddim-stochastic', 'dpm-solver'\]"
    ):
        choose_sampler(config, "ddpm", **given)
