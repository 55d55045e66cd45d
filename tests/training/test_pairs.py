"""The prepared pairs as training sees them."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spo.config import Config, load_config
from spo.data.preferences import PairWriter
from spo.models.autoencoder import Autoencoder
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.stages import prepare
from spo.tracking import NullTracker
from spo.training import pairs as module
from spo.training.pairs import load_pairs
from spo.training.preference import LabelledPairs
from spo.workspace import Workspace
from tests.test_pipeline import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_project(tmp_path_factory.mktemp("pairs") / "project", "sd15")
    with contextlib.chdir(root):
        prepare.run(load_config(), tracker=NullTracker())
    return root


@pytest.fixture
def config(project: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(project)
    return load_config()


@pytest.fixture
def base(config: Config) -> LatentDiffusion:
    return build(config.model, config.sampling, "cpu")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the autoencoder got."""
    counts: list[int] = []
    encode = Autoencoder.encode

    def counted(self: Autoencoder, images: Tensor) -> Tensor:
        counts.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", counted)
    return counts


def load(config: Config, base: LatentDiffusion, cache: Path, *, split: str = "train") -> LabelledPairs:
    return load_pairs(Workspace(config).prepared.pairs_file(split), base, config, cache=cache)


def same(one: LabelledPairs, other: LabelledPairs) -> bool:
    return torch.equal(one.latents(), other.latents()) and torch.equal(one.label, other.label)


def test_pictures_are_encoded_once_and_the_same_latents_come_back(
    config: Config, base: LatentDiffusion, encoded: list[int], tmp_path: Path
) -> None:
    first = load(config, base, tmp_path)
    assert sum(encoded) == 2 * len(first)
    encoded.clear()
    assert same(load(config, base, tmp_path), first)
    assert encoded == []
    load(config, base, tmp_path, split="validation")
    assert encoded  # another data set
    assert len(list(tmp_path.iterdir())) == 2


def test_a_picture_of_several_pairs_is_encoded_once(
    config: Config, base: LatentDiffusion, encoded: list[int], tmp_path: Path
) -> None:
    stored = module.PreferencePairs(Workspace(config).prepared.pairs_file("train"))
    one, other = stored[0], stored[1]
    path = tmp_path / "train.parquet"
    with PairWriter(path) as writer:
        for pair in (one, replace(one, image_1=other.image_1), replace(one, image_0=one.image_1, image_1=one.image_0)):
            writer.write(pair)
    pairs = load_pairs(path, base, config, cache=tmp_path / "cache")
    assert sum(encoded) == 3
    assert pairs.members.tolist() == [[0, 1], [0, 2], [1, 0]]
    assert torch.equal(pairs.latents()[0].flip(0), pairs.latents()[2])


def test_a_part_of_the_pairs_is_spread_over_the_file(config: Config, base: LatentDiffusion, tmp_path: Path) -> None:
    path = Workspace(config).prepared.pairs_file("train")
    stored = module.PreferencePairs(path)
    part = load_pairs(path, base, config, cache=tmp_path, limit=len(stored) // 3)
    rows = [i * len(stored) // len(part) for i in range(len(part))]
    assert rows[-1] >= 2 * len(stored) // 3
    assert part.captions == [stored[row].caption for row in rows]
    whole = load_pairs(path, base, config, cache=tmp_path)
    assert torch.allclose(part.latents(), whole.latents(torch.tensor(rows)), atol=1e-4)
    assert torch.equal(part.label, whole.label[rows])


def test_another_autoencoder_or_resolution_is_encoded_anew_in_place_of_the_old(
    config: Config, base: LatentDiffusion, encoded: list[int], tmp_path: Path
) -> None:
    first = load(config, base, tmp_path)
    encoded.clear()
    with torch.no_grad():
        next(base.autoencoder.vae.parameters()).mul_(1.5)
    second = load(config, base, tmp_path)
    assert encoded and not same(first, second)
    encoded.clear()
    smaller = config.model_copy(update={"model": config.model.model_copy(update={"resolution": 8})})
    assert load(smaller, base, tmp_path).latents().shape != second.latents().shape
    assert encoded
    assert len(list(tmp_path.iterdir())) == 1


def test_a_corrected_label_is_seen_in_a_file_too_large_to_be_read_whole(
    config: Config, base: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fingerprint", lambda _: "the same, as of the part that is read")
    path = tmp_path / "train.parquet"
    stored = module.PreferencePairs(Workspace(config).prepared.pairs_file("train"))
    pairs = [stored[index] for index in range(4)]

    def labels(turned: bool) -> Tensor:
        with PairWriter(path) as writer:
            for pair in pairs:
                labels = (pair.label_1, pair.label_0) if turned else (pair.label_0, pair.label_1)
                writer.write(replace(pair, label_0=labels[0], label_1=labels[1]))
        return load_pairs(path, base, config, cache=tmp_path / "cache").label

    assert torch.equal(labels(turned=False), labels(turned=True).flip(1))


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_what_is_kept_and_damaged_is_made_anew(
    config: Config, base: LatentDiffusion, encoded: list[int], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = load(config, base, tmp_path)
    encoded.clear()
    [file] = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert same(load(config, base, tmp_path), first)
    assert encoded
    encoded.clear()
    assert same(load(config, base, tmp_path), first)
    assert not encoded


def test_a_picture_is_cut_to_height_and_width_in_eight_bits(config: Config) -> None:
    stored = module.PreferencePairs(Workspace(config).prepared.pairs_file("train"))
    pixels = module._pixels(stored[0].image_0, (24, 16))
    assert (pixels.shape, pixels.dtype) == ((3, 24, 16), torch.uint8)
