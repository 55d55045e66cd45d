"""The published latent preference models in use, from their own checkpoints."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spo.core.types import Candidates, Conditioning
from spo.preference.latent import block_averages
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_score import LatentScorer
from tests.golden.lpo.conftest import PREFIX, assert_near, read

Figures = dict[str, Tensor]


@pytest.fixture(scope="module", params=PREFIX)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def preference(name: str) -> LatentPreference:
    return read(name)


@pytest.fixture(scope="module")
def published(name: str, figures: Figures) -> Figures:
    start = f"{PREFIX[name]}."
    return {key.removeprefix(start): tensor for key, tensor in figures.items() if key.startswith(start)}


@pytest.fixture(scope="module")
def text(preference: LatentPreference, settings: dict[str, Any]) -> Conditioning:
    with torch.no_grad():
        return preference.encode(settings["prompts"])


def test_tokens_are_the_published_ones(preference: LatentPreference, published: Figures, settings: dict[str, Any]):
    for tokenizer, key in zip(preference.tokenizers, ("input_ids", "input_ids_2"), strict=False):
        for prefix, prompts in (("", settings["prompts"]), ("null_", [""])):
            ids = tokenizer(
                prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
            ).input_ids
            assert torch.equal(ids, published[prefix + key])


def test_text_features_are_the_published_ones(text: Conditioning, published: Figures):
    assert_near(text.tensors["text"], published["text_features"])
    assert_near(text.tensors["prompt_embeds"], published["prompt_embeds"])
    assert_near(text.tensors["null_prompt_embeds"][:1], published["null_prompt_embeds"])
    if "pooled_prompt_embeds" in published:
        assert_near(text.tensors["pooled_embeds"], published["pooled_prompt_embeds"])
        assert_near(text.tensors["null_pooled_embeds"][:1], published["null_pooled_prompt_embeds"])


def test_the_pooled_text_before_the_projection_is_the_published_one(figures: Figures):
    encoder = read("lrm_sd15").model.text_encoders[0]
    with torch.no_grad():
        assert_near(encoder(figures["lrm15.input_ids"]).pooler_output, figures["lrm15.pooled_text"])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "null"])
def test_block_averages_are_the_published_ones(
    preference: LatentPreference, text: Conditioning, published: Figures, kind: str
):
    prefix = "null_" if kind == "null" else ""
    added = {}
    if "time_ids" in published:
        time_ids = published["time_ids"].expand(8, -1)
        added = {"text_embeds": text.tensors[f"{prefix}pooled_embeds"], "time_ids": time_ids}
    embeds = text.tensors[f"{prefix}prompt_embeds"]
    averages = block_averages(preference.model.unet, published["latents"], published["timesteps"], embeds, added)
    for i, average in enumerate(averages[:-1]):
        assert_near(average, published[f"pooled_block{i}_{kind}"])
    assert_near(averages[-1], published[f"pooled_mid_{kind}"])


@torch.no_grad()
def test_image_features_and_scores_are_the_published_ones(
    preference: LatentPreference, text: Conditioning, published: Figures
):
    model, given = preference.model, (published["latents"], published["timesteps"], text)
    assert_near(model.logit_scale.reshape(1), published["logit_scale"])
    assert_near(model.pooled_features(*given), published["pooled_visual"])
    assert_near(model.image_features(*given), published["image_features"])
    assert_near(model.score(*given), published["scores"])


def test_the_image_size_that_sdxl_is_told_is_the_published_one(figures: Figures):
    assert read("lrm_sdxl").model.image_size == figures["lrmxl.time_ids"][0, 0]


def test_scores_at_other_times_and_sizes_are_the_published_ones(
    preference: LatentPreference, text: Conditioning, published: Figures
):
    scorer = LatentScorer(preference, batch_size=3)  # in slices of 3
    first = torch.zeros(4, dtype=torch.long)
    times = torch.tensor([1, 51, 501, 951])
    scores = scorer.score_latents(published["latents"][first], times, text[first])
    assert_near(scores, published["scores_first_at_1_51_501_951"])
    scores = scorer.score_latents(published["latents_wide"], published["timesteps"][:4], text[:4])
    assert_near(scores, published["scores_wide"])


@torch.no_grad()
def test_scores_with_other_guidance_are_the_published_ones(name: str, text: Conditioning, published: Figures):
    given = published["latents"], published["timesteps"], text
    assert_near(read(name, guidance_scale=1.0).model.score(*given), published["scores_no_guidance"])
    num_guided = 5 if name == "lrm_sd15" else 3  # theirs leaves SDXL's first block out
    assert_near(read(name, num_guided=num_guided).model.score(*given), published["scores_guidance_all_blocks"])


def test_scores_of_candidates_are_the_published_ones_at_either_time(
    preference: LatentPreference, text: Conditioning, published: Figures
):
    """Latents 1 and 5 have prompts 1 and 5 and one time; as candidates they are (k = 1, b = 2)."""
    rows = torch.tensor([1, 5])
    t = int(published["timesteps"][1])
    scores = {}
    for at_step_time, times in ((False, (t, t + 50)), (True, (t - 50, t))):
        candidates = Candidates(
            published["latents"][rows][None],
            times[0],
            text[rows],
            predict_x_0=lambda: pytest.fail("a latent scorer needs no x_0"),
            decode=lambda latents: pytest.fail("a latent scorer needs no image"),
            t_from=times[1],
        )
        scores[at_step_time] = LatentScorer(preference, at_step_time=at_step_time)(candidates)
        assert_near(scores[at_step_time][0], published["scores"][rows])
