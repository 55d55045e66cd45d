"""The prepared pairs as training sees them."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from spo.config import Config, DiffusionDpoConfig, load_config
from spo.data.buckets import bucket_sizes, nearest_bucket
from spo.data.preferences import PairWriter, PreferencePair
from spo.methods.diffusion_dpo import DiffusionDpo
from spo.models.autoencoder import Autoencoder
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build
from spo.runtime import shards
from spo.stages import prepare
from spo.tracking import NullTracker
from spo.training import measure
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


def png(size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    """A picture of one colour; size: height and width."""
    file = BytesIO()
    Image.new("RGB", size[::-1], colour).save(file, "PNG")
    return file.getvalue()


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
    assert list(part.captions) == [stored[row].caption for row in rows]
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
    [file] = tmp_path.rglob("*.safetensors")
    data = file.read_bytes()
    file.unlink()  # it is still mapped, and a mapped file must not shrink
    file.write_bytes(damage(data))
    assert same(load(config, base, tmp_path), first)
    assert encoded
    encoded.clear()
    assert same(load(config, base, tmp_path), first)
    assert not encoded


def test_a_killed_encoding_continues_after_its_last_file(
    config: Config,
    base: LatentDiffusion,
    encoded: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = load(config, base, tmp_path / "whole")
    monkeypatch.setattr(measure, "PAIRS_IN_A_FILE", 8)
    encode = Autoencoder.encode

    def killed(self: Autoencoder, images: Tensor) -> Tensor:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(self, images)

    encoded.clear()
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Autoencoder, "encode", killed)
        load(config, base, tmp_path / "killed")
    encoded.clear()
    resumed = load(config, base, tmp_path / "killed")
    assert sum(encoded) == 2 * (len(whole) - 16)  # two files of 8 pairs were written
    assert f"continues after 16 of {len(whole)} pairs" in capsys.readouterr().err
    torch.testing.assert_close(resumed.latents(), whole.latents())
    assert torch.equal(resumed.label, whole.label) and list(resumed.captions) == list(whole.captions)


def test_pairs_in_files_give_the_batches_of_pairs_in_memory(
    config: Config, base: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PAIRS_IN_A_FILE", 8)
    pairs = load(config, base, tmp_path)
    in_memory = LabelledPairs.of(pairs.latents(), pairs.label, pairs.weight, list(pairs.captions))
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 2 * len(pairs)):
        index = torch.randint(len(pairs), (size,), generator=generator)
        assert torch.equal(pairs.latents(index), in_memory.latents(index))
    settings = DiffusionDpoConfig(batch_size=5)
    rounds = [DiffusionDpo(settings, base, each, seed=0).collect(0) for each in (pairs, in_memory)]
    for ours, theirs in zip(*rounds, strict=True):
        assert ours.examples is not None and theirs.examples is not None
        assert torch.equal(ours.examples.x_0, theirs.examples.x_0)
        assert torch.equal(ours.examples.noise, theirs.examples.noise)


def test_files_are_read_to_their_end_once(
    config: Config, base: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(config, base, tmp_path)
    read: list[Path] = []
    monkeypatch.setattr(shards, "kept", lambda path: read.append(path))  # finds it damaged
    load(config, base, tmp_path)
    assert read == []
    [file] = tmp_path.rglob("*.safetensors")
    file.touch()
    load(config, base, tmp_path)
    assert read == [file]


def test_latents_of_a_model_of_half_precision_have_half_precision(config: Config, tmp_path: Path) -> None:
    half = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    pairs = load(half, build(half.model, half.sampling, "cpu"), tmp_path)
    assert pairs.latents().dtype == torch.float32
    [file] = tmp_path.rglob("*.safetensors")
    assert load_file(file)["0"].dtype == torch.float16


def test_pairs_keep_their_aspect(config: Config, base: LatentDiffusion, tmp_path: Path) -> None:
    shapes = [((30, 20), (33, 20)), ((20, 20), (22, 20)), ((20, 40), (16, 33)), ((40, 30), (40, 20))]
    path = tmp_path / "train.parquet"
    with PairWriter(path) as writer:
        for number, both in enumerate(shapes):
            images = [png(shape, (40 * number, 10 * i, 200)) for i, shape in enumerate(both)]
            writer.write(PreferencePair("a cat", *images, 1.0, 0.0))
    buckets = config.model_copy(update={"model": config.model.model_copy(update={"bucket_step": 8})})
    sizes = bucket_sizes(config.model.size, 8)
    pairs = load_pairs(path, base, buckets, cache=tmp_path / "cache")
    factor = config.model.size[0] // base.latent_shape[1]
    for index, both in enumerate(shapes):
        _, height, width = pairs.latent_shape(torch.tensor([index]))
        assert (height * factor, width * factor) == sizes[nearest_bucket(sizes, both)]
    assert len(pairs.by_bucket(torch.arange(4))) > 1
    with pytest.raises(ValueError, match="different sizes"):
        pairs.latents(torch.arange(4))


def test_a_picture_is_cut_to_height_and_width_in_eight_bits(config: Config) -> None:
    stored = module.PreferencePairs(Workspace(config).prepared.pairs_file("train"))
    pixels = measure._pixels(stored[0].image_0, (24, 16))
    assert (pixels.shape, pixels.dtype) == ((3, 24, 16), torch.uint8)
