"""Training the step-aware preference model over real networks of random weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

from spo.config import PixelPreferenceConfig, SamplingConfig, load_config
from spo.errors import TrainingError
from spo.preference.checkpoint import load_clip
from spo.preference.labels import pairwise_accuracy
from spo.preference.score import PreferenceScorer
from spo.training.preference import LabelledPairs, StepAwareTraining, predicted_images
from spo.world.pretraining.clip import new_clip, new_tokenizer, save_clip
from tests.models.tiny import RESOLUTION, make_tiny_denoiser, make_tiny_pipeline
from tests.training.steps import assert_same_up_to_rounding


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = new_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_clip(new_clip(tokenizer), tokenizer, folder / "clip")
    return make_tiny_pipeline("sd15", folder / "base"), folder / "clip"


@pytest.fixture
def training(folders: tuple[Path, Path]) -> StepAwareTraining:
    config = PixelPreferenceConfig(start_from="-", steps=30, batch_size=8, learning_rate=1e-3, warmup_steps=2)
    base = make_tiny_denoiser("sd15", folders[0], sampling=SamplingConfig(steps=5))
    return StepAwareTraining(base, load_clip(folders[1], generator=Generator().manual_seed(0)), config)


def make_pairs(training: StepAwareTraining, n: int = 16) -> LabelledPairs:
    """Bright images are preferred to dark ones; either may come first."""
    generator = Generator().manual_seed(1)
    level = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1, 1)
    images = level + 0.05 * torch.randn(n, 2, 3, RESOLUTION, RESOLUTION, generator=generator)
    label = torch.tensor([[1.0, 0.0]]).repeat(n, 1)
    images[::2], label[::2] = images[::2].flip(1), label[::2].flip(1)
    latents = training.base.autoencoder.encode(images.flatten(0, 1).clamp(0, 1)).unflatten(0, (n, 2))
    return LabelledPairs.of(latents, label, torch.ones(n), ["a red circle"] * n)


def train(training: StepAwareTraining, pairs: LabelledPairs, *, seed: int = 0) -> list:
    """Make all steps; their measurements."""
    return [training.step(pairs, step, seed=seed) for step in range(training.config.steps)]


def test_two_equal_images_score_equally_because_they_share_their_noise(training):
    pairs = make_pairs(training, 4)
    same = replace(pairs, members=pairs.members[:, :1].expand(-1, 2))
    noise = training.noise(same, torch.arange(4), Generator().manual_seed(0))
    scores = training.scores(same, torch.arange(4), torch.full((4,), 501), noise)
    torch.testing.assert_close(scores[:, 0], scores[:, 1], rtol=1e-4, atol=1e-4)


def test_both_images_and_both_halves_of_the_guidance_take_one_unet_call(training):
    calls = []
    training.base.network.module.register_forward_hook(lambda *_: calls.append(1))
    training.base.network.forwards = 0
    pairs = make_pairs(training, 4)
    noise = training.noise(pairs, torch.arange(4), Generator().manual_seed(0))
    training.scores(pairs, torch.arange(4), torch.full((4,), 501), noise)
    assert training.base.network.forwards == 4 * 2 * 2
    assert len(calls) == 1


def test_a_blind_model_always_gets_t_0(training, monkeypatch):
    given = []
    look = training.model.image_features
    monkeypatch.setattr(
        training.model, "image_features", lambda pixels, t: given.append(t.unique().tolist()) or look(pixels, t)
    )
    pairs, t = make_pairs(training, 4), torch.full((4,), 501)
    noise = training.noise(pairs, torch.arange(4), Generator().manual_seed(0))
    for blind in (False, True):
        training.config = training.config.model_copy(update={"blind": blind})
        training.scores(pairs, torch.arange(4), t, noise)
    assert given == [[501], [0]]


def test_at_a_small_t_the_model_sees_the_clean_images(training):
    pairs = make_pairs(training, 4)
    noise = torch.randn(pairs.latents().shape, generator=Generator().manual_seed(0))
    cond = training.base.encode(list(pairs.captions))
    seen = predicted_images(training.base, pairs.latents(), noise, torch.zeros(4, dtype=torch.long), cond)
    clean = training.base.decode(pairs.latents().flatten(0, 1))
    noisy = predicted_images(training.base, pairs.latents(), noise, torch.full((4,), 901), cond)
    assert (seen - clean).abs().mean() < 0.6 * (noisy - clean).abs().mean()


def test_training_learns_the_preference_and_leaves_the_base_alone(training):
    pairs = make_pairs(training)
    before = [parameter.clone() for parameter in training.base.network.module.parameters()]
    start, count = training.accuracy(pairs, 1, seed=0)
    rows = train(training, pairs)
    assert count == 16
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert training.accuracy(pairs, 1, seed=0)[0] > max(start, 0.75)
    assert all(
        torch.equal(one, other) for one, other in zip(before, training.base.network.module.parameters(), strict=True)
    )


def test_the_vision_tower_comes_to_depend_on_t(training):
    assert not any(layer.weight.any() for layer in training.model.layer_modulation)
    training.step(make_pairs(training), 0, seed=0)
    assert all(layer.weight.abs().sum() > 0 for layer in training.model.layer_modulation)


def test_swapped_labels_turn_the_accuracy_round(training):
    pairs = make_pairs(training)
    accuracy, _ = training.accuracy(pairs, 301, seed=0)
    swapped, _ = training.accuracy(replace(pairs, label=pairs.label.flip(1)), 301, seed=0)
    assert accuracy + swapped == pytest.approx(1)


def test_ties_are_learned_from_but_not_counted(training):
    pairs = make_pairs(training)
    label = pairs.label.clone()
    label[:4] = 0.5
    assert training.accuracy(replace(pairs, label=label), 1, seed=0)[1] == 12


def test_the_same_seed_trains_the_same_model(folders):
    def trained() -> torch.Tensor:
        config = PixelPreferenceConfig(start_from="-", steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=1)
        base = make_tiny_denoiser("sd15", folders[0], sampling=SamplingConfig(steps=5))
        training = StepAwareTraining(base, load_clip(folders[1], generator=Generator().manual_seed(0)), config)
        train(training, make_pairs(training), seed=5)
        return torch.cat([parameter.flatten() for parameter in training.model.parameters()])

    assert torch.equal(trained(), trained())


def test_a_step_that_is_not_finite_changes_nothing_and_too_many_end_the_run(training):
    pairs = make_pairs(training)
    broken = replace(pairs, label=pairs.label * float("nan"))
    training.updater.guard.most_in_a_row = 2
    before = [parameter.clone() for parameter in training.model.parameters()]
    assert training.step(broken, 0, seed=0) is None
    with pytest.raises(TrainingError, match=r"2 updates in a row.*learning_rate"):
        training.step(broken, 1, seed=0)
    assert all(torch.equal(one, other) for one, other in zip(before, training.model.parameters(), strict=True))
    assert training.step(pairs, 2, seed=0) is not None
    assert training.updater.guard.skipped == 2


def test_at_t_0_the_images_themselves_are_scored(training, monkeypatch):
    """Not what the base would make of them; so is the end of a rollout."""
    pairs = make_pairs(training)
    pixels = training.preference.preprocess(training.base.decode(pairs.latents().flatten(0, 1)))
    scorer = PreferenceScorer(training.preference)
    text = scorer.encode(pairs.captions).repeat_interleave(2, dim=0)
    with torch.no_grad():
        features = training.model.image_features(pixels, torch.zeros(len(pixels), dtype=torch.long))
        expected = training.model.score(features, text).unflatten(0, (-1, 2))
    monkeypatch.setattr("spo.training.preference.predicted_images", lambda *_: pytest.fail("the base was asked"))
    accuracy, count = training.accuracy(pairs, 0, seed=0)
    sided = (expected[:, 0] > expected[:, 1]) == (pairs.label[:, 0] > pairs.label[:, 1])
    assert (accuracy, count) == (pytest.approx(sided.float().mean().item()), len(pairs))


def gradients_of_a_step(training: StepAwareTraining) -> tuple[dict[str, float], torch.Tensor]:
    """The measurements and the gradient of the first step; the pairs weigh differently."""
    pairs = replace(make_pairs(training), weight=torch.linspace(0.2, 1.0, 16))
    training.updater.optimizer.zero_grad = lambda: None  # keep the gradients of the step
    row = training.step(pairs, 0, seed=0)
    assert row is not None
    return row, torch.cat([p.grad.flatten() for p in training.model.parameters() if p.grad is not None])


def started(training: StepAwareTraining, folder: Path, **settings) -> StepAwareTraining:
    """A training of the same base and start, with some other settings."""
    config = training.config.model_copy(update=settings)
    preference = load_clip(folder, generator=Generator().manual_seed(0))
    with torch.no_grad():  # so that the timestep has an effect and every weight a gradient
        for layer in (*preference.model.layer_modulation, preference.model.final_modulation):
            layer.weight.normal_(std=0.02, generator=Generator().manual_seed(1))
    return StepAwareTraining(training.base, preference, config)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_make_the_step_of_the_whole_batch(training, folders, size):
    one, ours = gradients_of_a_step(started(training, folders[1]))
    other, theirs = gradients_of_a_step(started(training, folders[1], micro_batch_size=size))
    assert other == pytest.approx(one, rel=1e-3)
    assert_same_up_to_rounding(ours, theirs)


def test_gradient_checkpointing_changes_no_gradient_and_computes_each_layer_twice(training, folders):
    plain, checkpointed = started(training, folders[1]), started(training, folders[1])
    checkpointed.model.enable_gradient_checkpointing()
    calls = []
    for each in (plain, checkpointed):
        clip, count = each.model.clip, {"vision": 0, "text": 0}
        calls.append(count)
        for name, tower in (("vision", clip.vision_model), ("text", clip.text_model)):

            def counted(*_, name=name, count=count):
                count[name] += 1

            tower.encoder.layers[0].mlp.register_forward_pre_hook(counted)
    one, ours = gradients_of_a_step(plain)
    other, theirs = gradients_of_a_step(checkpointed)
    assert calls == [{"vision": 1, "text": 1}, {"vision": 2, "text": 2}]
    assert other == pytest.approx(one, rel=1e-4)
    assert_same_up_to_rounding(ours, theirs)


@pytest.mark.parametrize("switched", [False, True])
def test_the_profile_switches_gradient_checkpointing_on(training, folders, switched):
    config = load_config(Path(__file__).parents[2], "tiny")
    settings = {
        "model": config.model.model_copy(update={"gradient_checkpointing": switched}),
        "preference_models": {"pixel": training.config.model_copy(update={"start_from": str(folders[1])})},
    }
    started = StepAwareTraining.start(training.base, config.model_copy(update=settings), "pixel")
    assert started.model.gradient_checkpointing == switched


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights(training, dtype):
    training.model.float()
    half = StepAwareTraining(training.base, training.preference, training.config.model_copy(update={"dtype": dtype}))
    pairs = make_pairs(half)
    index, t = torch.arange(8), torch.full((8,), 501)
    noise = training.noise(pairs, index, Generator().manual_seed(0))
    with torch.no_grad():
        full, rounded = (each.scores(pairs, index, t, noise) for each in (training, half))
    torch.testing.assert_close(rounded, full, rtol=0.05, atol=0.3)
    assert not torch.equal(rounded, full)
    first = [row for row in (half.step(pairs, step, seed=0) for step in range(3)) if row]
    assert first
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half.updater.scaler.get_scale() == {"bfloat16": 1.0, "float16": 2.0**16}[dtype]


def test_a_batch_of_several_sizes_has_the_loss_of_its_parts(training):
    pairs, (channels, height, width) = make_pairs(training, 8), training.base.latent_shape
    wide = torch.randn(8, channels, height, 2 * width, generator=Generator().manual_seed(8))
    bucket = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    members = pairs.members.clone()
    members[bucket == 1] = torch.arange(8).view(4, 2)
    weight = torch.arange(1.0, 9.0)
    several = replace(pairs, pictures={0: pairs.pictures[0], 1: wide}, bucket=bucket, members=members, weight=weight)
    index, t = torch.arange(8), torch.arange(8) * 100
    whole = training._accumulate(several, index, t, Generator().manual_seed(0))
    gradient = flat_gradient(training)
    generator, total, of_parts = Generator().manual_seed(0), 0.0, torch.zeros_like(gradient)
    for places in several.by_bucket(index):
        part = float(weight[places].sum() / weight.sum())
        total += part * training._accumulate(several, places, t[places], generator)["loss"]
        of_parts += part * flat_gradient(training)
    assert whole["loss"] == pytest.approx(total, rel=1e-4)
    assert_same_up_to_rounding(of_parts, gradient)
    assert of_parts.norm() > 0
    [right] = {training.accuracy(several, 0, seed=seed)[0] for seed in (0, 1)}  # at t = 0 there is no noise
    noise = torch.zeros(8, 1, 1, 1, 1)
    with torch.no_grad():
        found = [
            training.scores(several, index[i : i + 1], torch.zeros(1, dtype=torch.long), noise[:1], clean=True)
            for i in range(8)
        ]
    assert right == pairwise_accuracy(torch.cat(found), several.label)[0]


def flat_gradient(training: StepAwareTraining) -> torch.Tensor:
    """The gradients of the model, which are then removed."""
    parameters = [each for each in training.model.parameters() if each.grad is not None]
    found = torch.cat([each.grad.flatten() for each in parameters])
    training.updater.optimizer.zero_grad()
    return found
