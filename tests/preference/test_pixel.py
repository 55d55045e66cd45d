import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from spo.preference.pixel import Modulation, StepAwareCLIP


@pytest.mark.parametrize("t", [0, 1, 501, 999])
def test_at_the_start_equals_the_plain_clip_for_every_t(clip: CLIPModel, images: torch.Tensor, t: int):
    plain = F.normalize(clip.get_image_features(pixel_values=images).pooler_output, dim=-1)
    ours = StepAwareCLIP.from_clip(clip).image_features(images, torch.full((5,), t))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


def test_the_start_is_the_same_for_the_same_generator(clip: CLIPModel):
    first, second = (
        StepAwareCLIP.from_clip(clip, generator=torch.Generator().manual_seed(3)).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modulations_start_as_the_identity_without_random_draws():
    before = torch.get_rng_state()
    layer = Modulation(3, parts=6, gates=(2, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert layer(torch.randn(2, 3)).tolist() == [[*6 * [0.0], *3 * [1.0], *6 * [0.0], *3 * [1.0]]] * 2


def test_text_features_and_score_are_the_plain_clips(clip: CLIPModel, images: torch.Tensor):
    ids = torch.tensor([[62, 3, 4, 63, 63], [62, 9, 63, 63, 63]])
    model = StepAwareCLIP.from_clip(clip)
    text = model.text_features(ids)
    plain = clip(input_ids=ids, pixel_values=images[:2])
    torch.testing.assert_close(text, plain.text_embeds, rtol=0, atol=1e-6)
    score = model.score(model.image_features(images[:2], torch.tensor([5, 700])), text)
    torch.testing.assert_close(score, plain.logits_per_image.diagonal(), rtol=1e-5, atol=1e-5)


def test_depends_on_t_once_trained(step_aware: StepAwareCLIP, images: torch.Tensor):
    early, late = (step_aware.image_features(images, torch.full((5,), t)) for t in (1, 951))
    assert (early - late).abs().max() > 1e-2


def test_an_image_is_scored_the_same_alone_and_in_a_batch_of_many_timesteps(
    step_aware: StepAwareCLIP, images: torch.Tensor, timesteps: torch.Tensor
):
    together = step_aware.image_features(images, timesteps)
    alone = torch.cat([step_aware.image_features(images[i : i + 1], timesteps[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_one_t_for_all_equals_that_t_for_each(step_aware: StepAwareCLIP, images: torch.Tensor):
    shared = step_aware.image_features(images, torch.tensor(401))
    torch.testing.assert_close(shared, step_aware.image_features(images, torch.full((5,), 401)), rtol=1e-5, atol=1e-6)


def test_modulations_are_computed_once_for_each_distinct_t(
    step_aware: StepAwareCLIP, images: torch.Tensor, timesteps: torch.Tensor
):
    rows: list[int] = []
    for layer in step_aware.layer_modulation:
        layer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    step_aware.image_features(images, timesteps)
    assert rows == [4, 4]


def test_all_of_the_vision_tower_and_its_modulation_learn_once_training_has_begun(
    step_aware: StepAwareCLIP, images: torch.Tensor, timesteps: torch.Tensor
):
    step_aware.image_features(images, timesteps)[:, 0].sum().backward()
    without = [name for name, parameter in step_aware.named_parameters() if parameter.grad is None]
    assert all(name.startswith(("clip.text", "clip.logit_scale")) for name in without)
    assert step_aware.t_embedder.mlp[0].weight.grad.abs().sum() > 0
