"""Pictures to choose from: keyed seeds, made once, of prompts for both sides; and existing pairs."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from spo.config import Config, LoraConfig, ModelConfig, SamplerConfig, load_config
from spo.data.prompts import split_prompts
from spo.errors import DataError, ModelError
from spo.evaluation.resolve_model import Source
from spo.models.generate import generate, image_seed
from spo.models.lora import add_lora, save_lora
from spo.people import pictures
from spo.people.pictures import Pictures, existing_pairs, prompts_to_label
from spo.runtime.pictures import to_picture
from tests.models.tiny import RESOLUTION, make_tiny_denoiser, make_tiny_pipeline, shake

ROOT = Path(__file__).parents[2]
SAMPLER = SamplerConfig(steps=2, eta=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a random base, a LoRA for it, and a few prompts."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_pipeline("sd15", root / "base")
    denoiser = make_tiny_denoiser("sd15", root / "base")
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
    shake(denoiser)
    save_lora(denoiser.network, root / "lora")
    (root / "data/prompts").mkdir(parents=True)
    (root / "data/prompts/world.txt").write_text("".join(f"a cross number {i}\n" for i in range(20)))
    return root


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    model = ModelConfig(family="sd15", path=str(root / "base"), resolution=RESOLUTION)
    return load_config(ROOT, "tiny").model_copy(update={"model": model})


@pytest.fixture(scope="module")
def base(config: Config) -> Source:
    return Source("base", None, "the base")


def test_validation_prompts_are_spread_among_those_of_training_and_test_prompts_are_absent(config, root) -> None:
    prompts = [f"a cross number {i}" for i in range(20)]
    split = split_prompts(prompts, seed=0, validation_fraction=0.12, test_fraction=0.25)
    shown = prompts_to_label(config, root)
    assert sorted(shown) == sorted([*split.train, *split.validation])
    places = [i for i, prompt in enumerate(shown) if prompt in split.validation]
    assert places[0] < len(shown) / 2 <= places[1]


def test_a_picture_depends_on_its_seed_and_prompt_alone(config, base, root, tmp_path: Path) -> None:
    found = list(Pictures(config, base, SAMPLER, seed=5, folder=tmp_path, root=root).pairs(6))
    pair = found[4]  # of the second batch
    seeds = [image_seed(5, pair.prompt, i) for i in (0, 1)]
    assert [pair.facts["seed_0"], pair.facts["seed_1"]] == seeds
    model = make_tiny_denoiser("sd15", root / "base")
    images = generate(model, [pair.prompt] * 2, seeds, sampler=SAMPLER, batch_size=2)
    for file, image in zip(pair.pictures, images, strict=True):
        made = torch.tensor(list(Image.open(file).tobytes()), dtype=torch.float64)
        expected = torch.tensor(list(to_picture(image).tobytes()), dtype=torch.float64)
        assert (made - expected).abs().max() <= 1  # other batch sizes round differently
    other = torch.tensor(list(Image.open(found[0].pictures[0]).tobytes()), dtype=torch.float64)
    assert (other - expected).abs().max() > 10


def test_pictures_are_made_once(config, base, root, tmp_path: Path, monkeypatch) -> None:
    def new() -> Pictures:
        return Pictures(config, base, SAMPLER, seed=5, folder=tmp_path, root=root)

    first = list(new().pairs(2))
    monkeypatch.setattr(pictures, "build", lambda *_: pytest.fail("the model was loaded again"))
    assert list(new().pairs(2)) == first


def test_another_model_sampler_or_seed_gives_other_pairs(config, base, root, tmp_path: Path) -> None:
    lora = Source("spo", root / "lora", "a LoRA")
    variants = [(base, SAMPLER, 5), (base, SAMPLER, 6), (base, SamplerConfig(steps=3, eta=0.0), 5), (lora, SAMPLER, 5)]
    names = {
        next(iter(Pictures(config, source, sampler, seed=seed, folder=tmp_path, root=root).pairs(1))).id
        for source, sampler, seed in variants
    }
    assert len(names) == 4


def test_when_the_prompts_end_they_come_again_with_other_seeds(config, base, root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Pictures, "_make", lambda *_: None)
    made = Pictures(config, base, SAMPLER, seed=5, folder=tmp_path, root=root)
    num = len(prompts_to_label(config, root))
    found = list(made.pairs(2 * num))
    assert [pair.prompt for pair in found[:num]] == [pair.prompt for pair in found[num:]]
    assert len({seed for pair in found for seed in (pair.facts["seed_0"], pair.facts["seed_1"])}) == 4 * num


def test_a_model_that_makes_no_finite_picture_is_told(config, base, root, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "generate", lambda *_, **__: torch.full((8, 3, 8, 8), float("nan")))
    with pytest.raises(ModelError, match="not finite"):
        list(Pictures(config, base, SAMPLER, seed=5, folder=tmp_path, root=root).pairs(4))
    assert list(tmp_path.iterdir()) == []


def encoded(kind: str, colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four rows: JPEG and PNG, the same again, TIFF and BMP, and one without a picture."""
    folder = tmp_path / "source"
    folder.mkdir()
    names = ("a.jpeg", "b.png", "c.tiff", "d.bmp")
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(name[2:].upper(), (60 * i, 0, 90)))
    rows = [("a.jpeg", "b.png"), ("a.jpeg", "b.png"), ("c.tiff", "d.bmp"), ("nothing.png", "a.jpeg")]
    lines = [
        json.dumps({"caption": "a cross", "image_0": a, "image_1": b, "label_0": 1, "label_1": 0}) for a, b in rows
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


def test_existing_pairs_keep_their_bytes_unless_browsers_cannot_show_them(source: Path, tmp_path: Path) -> None:
    first, second = existing_pairs(str(source), tmp_path / "cache", num=None)
    assert [path.suffix for path in (*first.pictures, *second.pictures)] == [".jpg", ".png", ".png", ".png"]
    assert first.pictures[0].read_bytes() == (source / "a.jpeg").read_bytes()
    assert first.pictures[1].read_bytes() == (source / "b.png").read_bytes()
    assert Image.open(second.pictures[0]).tobytes() == Image.open(source / "c.tiff").tobytes()
    assert "label" not in str(first.facts)
    assert [pair.id for pair in existing_pairs(str(source), tmp_path / "cache", num=1)] == [first.id]


def test_a_source_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; name a file, a folder or hub:NAME"):
        next(existing_pairs("nowhere", tmp_path / "cache", num=None, root=tmp_path))
