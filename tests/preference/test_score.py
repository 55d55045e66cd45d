import pytest
import torch

from spo.core.types import Candidates, Scorer
from spo.preference.checkpoint import PreferenceModel
from spo.preference.score import PreferenceScorer

PROMPTS = ["a red cat", "9 dogs", "a red cat", "b", "a text that is far longer than the context of the model"]


def test_scores_are_the_cosines_of_the_models_own_features(
    preference: PreferenceModel, images: torch.Tensor, timesteps: torch.Tensor
):
    scorer = PreferenceScorer(preference)
    model = preference.model
    with torch.no_grad():
        ids = preference.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        text = model.text_features(ids.input_ids)
        image = model.image_features(preference.preprocess(images), timesteps)
        expected = model.clip.logit_scale.exp() * (image * text).sum(dim=1)
    torch.testing.assert_close(scorer.score_images(images, scorer.encode(PROMPTS), timesteps), expected)


def test_text_features_computed_once_serve_every_image_of_the_prompt(
    preference: PreferenceModel, images: torch.Tensor, timesteps: torch.Tensor
):
    scorer = PreferenceScorer(preference)
    once = scorer.score_images(images, scorer.encode(PROMPTS[:1]).expand(5, -1), timesteps)
    again = torch.cat(
        [scorer.score_images(images[i : i + 1], scorer.encode(PROMPTS[:1]), timesteps[i : i + 1]) for i in range(5)]
    )
    torch.testing.assert_close(once, again, rtol=1e-5, atol=1e-5)


def test_one_t_for_all_images_gives_the_same_scores_and_is_tabulated_once(
    preference: PreferenceModel, images: torch.Tensor
):
    scorer = PreferenceScorer(preference)
    text = scorer.encode(PROMPTS)
    calls: list[int] = []
    preference.model.t_embedder.register_forward_hook(lambda *_: calls.append(1))
    shared = [scorer.score_images(images, text, torch.tensor(t)) for t in (401, 1, 401)]
    assert len(calls) == 2
    assert torch.equal(shared[0], shared[2])
    torch.testing.assert_close(
        shared[0], scorer.score_images(images, text, torch.full((5,), 401)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("timestep", [None, 7])
def test_candidates_are_scored_by_their_decoded_x_0_at_their_own_t_or_at_the_one_it_is_given(
    preference: PreferenceModel, timestep: int | None
):
    scorer = PreferenceScorer(preference, timestep=timestep)
    x_0 = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # stands for latents and for images
    candidates = Candidates(
        torch.zeros_like(x_0), 401, scorer.encode(PROMPTS[:2]), predict_x_0=lambda: x_0, decode=lambda latents: latents
    )
    as_scorer: Scorer = scorer
    scores = as_scorer(candidates)
    t = torch.tensor(401 if timestep is None else timestep)
    for k in range(3):
        torch.testing.assert_close(
            scores[k], PreferenceScorer(preference).score_images(x_0[k], candidates.text, t), rtol=1e-5, atol=1e-5
        )


def test_prompts_differ_and_equal_prompts_do_not(preference: PreferenceModel):
    text = PreferenceScorer(preference).encode(PROMPTS)
    torch.testing.assert_close(text[0], text[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(text[0], text[1], rtol=1e-2, atol=1e-2)


def test_images_of_any_size_are_scored_and_no_gradient_is_kept(preference: PreferenceModel, timesteps: torch.Tensor):
    scorer = PreferenceScorer(preference)
    big = torch.rand(5, 3, 40, 56, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = scorer.score_images(big, scorer.encode(PROMPTS), timesteps)
    assert scores.shape == (5,)
    assert not scores.requires_grad


def test_half_precision_comes_near_and_leaves_the_weights_alone(
    preference: PreferenceModel, images: torch.Tensor, timesteps: torch.Tensor
):
    full, half = PreferenceScorer(preference), PreferenceScorer(preference, dtype=torch.bfloat16)
    scores = half.score_images(images, half.encode(PROMPTS), timesteps)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full.score_images(images, full.encode(PROMPTS), timesteps), rtol=0.05, atol=0.3)
    assert {parameter.dtype for parameter in preference.model.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_scores_of_the_cpu(
    preference: PreferenceModel, images: torch.Tensor, timesteps: torch.Tensor
):
    here = PreferenceScorer(preference)
    expected = here.score_images(images, here.encode(PROMPTS), timesteps)
    there = PreferenceScorer(preference, device="cuda")
    scores = there.score_images(images, there.encode(PROMPTS), timesteps).cpu()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
