"""Training the latent preference model over real networks of random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from spo.config import LatentPreferenceConfig
from spo.core.types import LabelledPairs
from spo.errors import ModelError, TrainingError
from spo.models.flow import FlowNetwork
from spo.models.latent_diffusion import LatentDiffusion
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_score import LatentScorer
from spo.preference.latent_transformer import TransformerPreference
from spo.training.latent_preference import LatentPreferenceTraining
from tests.models.tiny import DIFFUSION, FAMILIES, make_tiny_denoiser, make_tiny_pipeline
from tests.training.steps import assert_same_up_to_rounding


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    folder = tmp_path_factory.mktemp("base")
    return make_tiny_denoiser(request.param, make_tiny_pipeline(request.param, folder))


def make_training(base: LatentDiffusion, **config) -> LatentPreferenceTraining:
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2, "max_grad_norm": 1.0, **config}
    preference: LatentPreference | TransformerPreference
    options: dict[str, Any] = {"projection_size": None, "guidance_scale": 7.5, "generator": Generator().manual_seed(0)}
    if isinstance(base.network, FlowNetwork):
        vae = base.autoencoder.vae
        preference = TransformerPreference.from_network(base.network, family="flow", vae=vae, layers=1, **options)
    else:
        preference = LatentPreference.from_pipeline(base.network.pipeline, **options)
    return LatentPreferenceTraining(base, preference, LatentPreferenceConfig(**settings))


def make_pairs(n: int = 16) -> LabelledPairs:
    """Latents whose first channel is high are preferred; either may come first."""
    latents = torch.randn(n, 2, 4, 8, 8, generator=Generator().manual_seed(1))
    latents[:, 0, 0] += 2
    latents[:, 1, 0] -= 2
    label = torch.tensor([[1.0, 0.0]]).repeat(n, 1)
    latents[::2], label[::2] = latents[::2].flip(1), label[::2].flip(1)
    weight = torch.linspace(0.2, 1.0, n)
    return LabelledPairs.of(latents, label, weight, [f"a {chr(97 + i)}" for i in range(n)])


def weights(training: LatentPreferenceTraining) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])


def test_training_learns_the_preference_and_leaves_the_base_alone(base: LatentDiffusion):
    training, pairs = make_training(base), make_pairs()
    before = [parameter.clone() for parameter in base.network.module.parameters()]
    calls: list[int] = []
    hook = base.network.module.register_forward_hook(lambda *_: calls.append(1))
    rows = list(training.train(pairs, seed=0))
    hook.remove()
    assert not calls
    assert rows[-1] is not None and rows[0] is not None and rows[-1]["loss"] < rows[0]["loss"]
    for t in (0, 301):
        accuracy, count = training.accuracy(pairs, t, seed=0)
        assert accuracy > 0.9 and count == 16
    assert all(torch.equal(one, other) for one, other in zip(before, base.network.module.parameters(), strict=True))


def test_what_was_trained_is_what_the_scorer_uses(base: LatentDiffusion):
    training, pairs = make_training(base), make_pairs(4)
    training.step(pairs, 0, seed=0)
    t, noise = torch.tensor([1, 301, 501, 951]), torch.randn(4, 2, 4, 8, 8, generator=Generator().manual_seed(3))
    with torch.no_grad():
        scores = training.scores(pairs, torch.arange(4), t, noise)
    scorer = LatentScorer(training.preference)
    text = scorer.encode(pairs.captions)
    for side in range(2):
        x_t = base.sampler.add_noise(pairs.latents()[:, side], noise[:, side], t)
        torch.testing.assert_close(scorer.score_latents(x_t, t, text), scores[:, side], rtol=1e-4, atol=1e-4)


def test_noise_is_each_images_own_or_the_pairs(base: LatentDiffusion):
    pairs, generator = make_pairs(4), Generator().manual_seed(0)
    same = replace(pairs, members=pairs.members[:, :1].expand(-1, 2))
    index, t = torch.arange(4), torch.full((4,), 501)
    for noise_per, images in (("image", 2), ("pair", 1)):
        training = make_training(base, noise_per=noise_per)
        noise = training.noise(same, index, generator)
        assert noise.shape == (4, images, 4, 8, 8)
        with torch.no_grad():
            one, other = training.scores(same, index, t, noise).unbind(dim=1)
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4) == (noise_per == "pair")


def test_times_are_drawn_from_the_grid_or_from_all(base: LatentDiffusion):
    drawn = make_training(base).times(2000, Generator().manual_seed(0))
    assert torch.equal(drawn.unique(), torch.arange(1, 1000, 50))
    drawn = make_training(base, timestep_stride=1).times(100_000, Generator().manual_seed(0))
    assert torch.equal(drawn.unique(), torch.arange(1, 1000))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_make_the_step_of_the_whole_batch(base: LatentDiffusion, size: int):
    pairs, whole = make_pairs(), make_training(base)
    parts = make_training(base, micro_batch_size=size)
    for training in (whole, parts):
        training.updater.optimizer.zero_grad = lambda: None  # keep the gradients of the step
    one, other = (training.step(pairs, 0, seed=0) for training in (whole, parts))
    assert one is not None and other is not None
    assert other == pytest.approx(one, rel=1e-3)
    both = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    gradients = [(p.grad, same.grad) for p, same in both if p.grad is not None]
    assert len(gradients) > 10
    ours, theirs = (torch.cat([pair[i].flatten() for pair in gradients]) for i in (0, 1))
    assert_same_up_to_rounding(ours, theirs)


def test_pairs_of_no_weight_teach_nothing(base: LatentDiffusion):
    pairs = make_pairs()
    pairs.weight[4:] = 0
    for training in (make_training(base), make_training(base, micro_batch_size=1)):
        assert training.step(pairs, 0, seed=0) is not None


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(base: LatentDiffusion):
    pairs, whole = make_pairs(), make_training(base)
    rows = [whole.step(pairs, step, seed=5) for step in range(4)]
    first = make_training(base)
    begun = [first.step(pairs, step, seed=5) for step in range(2)]
    tensors, values = first.updater.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second = make_training(base)
    second.updater.restore(tensors, values)
    assert begun + [second.step(pairs, step, seed=5) for step in (2, 3)] == rows
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights(base: LatentDiffusion, dtype: str):
    pairs, full, half = make_pairs(4), make_training(base), make_training(base, dtype=dtype, batch_size=4)
    index, t = torch.arange(4), torch.full((4,), 501)
    noise = full.noise(pairs, index, Generator().manual_seed(0))
    with torch.no_grad():
        expected, rounded = (each.scores(pairs, index, t, noise) for each in (full, half))
    torch.testing.assert_close(rounded, expected, rtol=0.05, atol=0.3)
    assert not torch.equal(rounded, expected)
    assert any(half.step(pairs, step, seed=0) for step in range(10))  # float16 first lowers its loss scale
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient(base: LatentDiffusion):
    pairs, plain, checkpointed = make_pairs(), make_training(base), make_training(base)
    checkpointed.model.enable_gradient_checkpointing()
    rows = [training.step(pairs, 0, seed=0) for training in (plain, checkpointed)]
    assert rows[0] is not None and rows[1] == pytest.approx(rows[0], rel=1e-4)


@pytest.mark.parametrize("base", DIFFUSION, indirect=True)  # the text encoders of a flow's model are not trained
def test_gradient_checkpointing_computes_the_layers_of_the_text_encoders_twice(base: LatentDiffusion):
    training, calls = make_training(base), []
    training.model.enable_gradient_checkpointing()
    for encoder in training.model.text_encoders:
        layers = getattr(encoder, "text_model", encoder).encoder.layers
        layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert training.step(make_pairs(), 0, seed=0) is not None
    assert len(calls) == 2 * len(training.model.text_encoders)


def test_a_step_that_is_not_finite_changes_nothing_and_too_many_end_the_run(base: LatentDiffusion):
    training, pairs = make_training(base), make_pairs()
    training.updater.guard.most_in_a_row = 2
    broken, before = replace(pairs, label=pairs.label * float("nan")), weights(training)
    assert training.step(broken, 0, seed=0) is None
    with pytest.raises(TrainingError, match="2 updates in a row"):
        training.step(broken, 1, seed=0)
    assert torch.equal(weights(training), before)


def test_a_model_of_another_autoencoder_is_refused(base: LatentDiffusion, tmp_path: Path):
    folder = make_tiny_pipeline("sd15", tmp_path / "other", seed=9)
    other = LatentPreference.from_pipeline(make_tiny_denoiser("sd15", folder).network.pipeline)
    with pytest.raises(ModelError, match="another autoencoder"):
        LatentPreferenceTraining(base, other, LatentPreferenceConfig())
