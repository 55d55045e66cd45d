from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spo.config import LoraConfig
from spo.core.types import Candidates, Conditioning, Scorer
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.preference.latent import LOGIT_SCALE, LatentPreferenceModel, half_of, half_unet
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_score import LatentScorer
from tests.models.tiny import DIFFUSION
from tests.preference.latents import PROMPTS, latents, make_base, make_preference

TINY = Path(__file__).parents[2] / "data" / "base" / "tiny"


@pytest.fixture(scope="module", params=DIFFUSION)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return make_base(request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture
def preference(base: LatentDiffusion) -> LatentPreference:
    return make_preference(base)


def candidates(x: torch.Tensor, t: float, text: Any, **options: Any) -> Candidates:
    """Ones that fail when they are asked for more than their latents."""

    def fail(*_: Any) -> torch.Tensor:
        raise AssertionError("a latent scorer needs neither x_0 nor images")

    return Candidates(x, t, text, predict_x_0=fail, decode=fail, **options)


# The model


@torch.no_grad()
def test_the_averages_are_of_what_the_whole_unets_own_forward_computes(
    base: LatentDiffusion, preference: LatentPreference
):
    """Oracle: diffusers' forward, with hooks on the layers that the features are of."""
    network, model, x, t = base.network, preference.model, latents(3), torch.tensor([1, 401, 951])
    layers: list[torch.Tensor] = []
    unet = network.module
    sources = [(block.attentions if hasattr(block, "attentions") else block.resnets)[-1] for block in unet.down_blocks]
    hooks = [
        source.register_forward_hook(
            lambda module, given, out: layers.append(out[0] if isinstance(out, tuple) else out)
        )
        for source in [*sources, unet.mid_block]
    ]
    text = preference.encode(PROMPTS)
    cond = base.encode(PROMPTS)
    network.predict(x, t, cond, guidance_scale=1.0)
    for hook in hooks:
        hook.remove()
    expected = [layer.mean(dim=(2, 3)) for layer in layers]
    model.guidance_scale = 1.0
    told = x.shape[-1] * network.pipeline.vae_scale_factor  # to SDXL's UNet
    model.image_size, size = told, model.image_size
    torch.testing.assert_close(model.pooled_features(x, t, text), torch.cat(expected, dim=1))
    model.image_size = size


SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
)


@pytest.mark.parametrize(
    ("unet", "encoders", "features", "size"),
    [(SD15, [(CLIPTextModel, CLIP_L)], 4800, 768),
     (SDXL, [(CLIPTextModel, CLIP_L), (CLIPTextModelWithProjection, CLIP_G)], 3520, 1280)],
    ids=DIFFUSION,
)  # fmt: skip
@torch.no_grad()
def test_the_real_models_have_the_papers_widths(unet: dict, encoders: list, features: int, size: int):
    """Without weights: on the meta device there are shapes only."""
    with torch.device("meta"):
        model = LatentPreferenceModel(
            half_unet(unet), [kind(config) for kind, config in encoders], projection_size=size, image_size=1024
        )
        text = {"text": torch.zeros(2, size), "prompt_embeds": torch.zeros(2, 77, unet["cross_attention_dim"])}
        text |= {"null_prompt_embeds": text["prompt_embeds"]}
        text |= {"pooled_embeds": text["text"], "null_pooled_embeds": text["text"]} if len(encoders) == 2 else {}
        given = torch.zeros(2, 4, 16, 16), torch.zeros(2), Conditioning(text)
        assert model.pooled_features(*given).shape == (2, features)
        assert model.image_features(*given).shape == (2, size)


def test_it_starts_as_the_papers_does(preference: LatentPreference):
    model = preference.model
    assert model.logit_scale.item() == pytest.approx(LOGIT_SCALE)
    assert model.visual_projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.visual_projection.bias is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_has_no_up_path_and_shares_no_weight_with_the_base(base: LatentDiffusion, preference: LatentPreference):
    assert not any("up_blocks" in name or "conv_out" in name for name in preference.model.state_dict())
    with torch.no_grad():
        for parameter in preference.model.parameters():
            parameter.add_(1.0)
    again = make_preference(base)
    assert not torch.equal(again.model.unet.conv_in.weight, preference.model.unet.conv_in.weight)
    assert torch.equal(again.model.unet.conv_in.weight, base.network.module.conv_in.weight)
    assert not any(parameter.requires_grad for parameter in base.network.module.parameters())


def test_the_base_may_be_in_half_precision(base: LatentDiffusion):
    half = half_of(base.network.module.to(torch.bfloat16))
    base.network.module.to(torch.float32)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


def test_the_downs_see_the_prompt_alone_and_the_mid_is_guided(preference: LatentPreference):
    model, x, t = preference.model, latents(3), torch.tensor([1, 401, 951])
    with torch.no_grad():
        text = preference.encode(PROMPTS)
        features = {}
        for scale in (1.0, 2.0, 7.5):
            model.guidance_scale = scale
            features[scale] = model.pooled_features(x, t, text)
    mid = model.widths[-1]
    torch.testing.assert_close(features[7.5][:, :-mid], features[1.0][:, :-mid])
    step = (features[2.0] - features[1.0])[:, -mid:]  # text - null
    assert step.abs().max() > 1e-4
    torch.testing.assert_close(features[7.5][:, -mid:], features[1.0][:, -mid:] + 6.5 * step, rtol=1e-3, atol=1e-4)


def test_a_text_projection_can_be_given_to_start_from(base: LatentDiffusion):
    size = (7, 32)
    if make_preference(base).family == "sdxl":
        with pytest.raises(ValueError, match="does not fit"):
            make_preference(base, text_projection=torch.ones(size), projection_size=32)
    else:
        model = make_preference(base, text_projection=torch.ones(size), projection_size=7).model
        assert torch.equal(model.text_projection.weight, torch.ones(size))
        assert model.visual_projection.out_features == 7


def test_a_number_of_guided_features_that_there_are_not_is_named(base: LatentDiffusion):
    with pytest.raises(ValueError, match=r"num_guided=4 must lie in \[1, 3\]"):
        make_preference(base, num_guided=4)


def test_a_base_with_a_lora_is_refused(base: LatentDiffusion, tmp_path: Path):
    other = make_base("sd15", tmp_path)
    add_lora(other.network.module, LoraConfig(rank=2), seed=0)
    with pytest.raises(ValueError, match="LoRA"):
        LatentPreference.from_pipeline(other.network.pipeline)


def test_the_embedded_base_makes_one():
    pipeline = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, feature_extractor=None)
    preference = LatentPreference.from_pipeline(pipeline, projection_size=64)
    assert preference.model.visual_projection.weight.shape == (64, 32 + 64 + 64)
    scorer = LatentScorer(preference)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert scorer.score_latents(x, torch.tensor([1, 901]), scorer.encode(["a red circle", "fog"])).isfinite().all()
    assert preference.check_autoencoder(pipeline.vae) is None


# The scorer


def test_candidates_are_scored_as_they_are_at_their_own_time(preference: LatentPreference):
    scorer, x = LatentScorer(preference), latents(6).unflatten(0, (2, 3))
    as_scorer: Scorer = scorer
    text = scorer.encode(PROMPTS)
    scores = as_scorer(candidates(x, 401, text, t_from=601))
    assert scores.shape == (2, 3) and scores.dtype == torch.float32 and not scores.requires_grad
    for k in range(2):
        with torch.no_grad():
            expected = preference.model.score(x[k], torch.full((3,), 401), text)
        torch.testing.assert_close(scores[k], expected, rtol=1e-4, atol=1e-5)


def test_the_published_time_is_that_from_which_the_step_started(preference: LatentPreference):
    scorer, x = LatentScorer(preference), latents(6).unflatten(0, (2, 3))
    text = scorer.encode(PROMPTS)
    noisier = LatentScorer(preference, at_step_time=True)
    scores = noisier(candidates(x, 401, text, t_from=601))
    torch.testing.assert_close(scores, scorer(candidates(x, 601, text)))
    assert not torch.allclose(scores, scorer(candidates(x, 401, text)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="t_from"):
        noisier(candidates(x, 401, text))


def test_slices_give_the_scores_of_the_whole(preference: LatentPreference):
    x, t = latents(5), torch.tensor([1, 51, 401, 951, 0])
    prompts = ["a", "b", "c", "d", "e"]
    whole, sliced = LatentScorer(preference), LatentScorer(preference, batch_size=2)
    text = whole.encode(prompts)
    torch.testing.assert_close(sliced.score_latents(x, t, text), whole.score_latents(x, t, text), rtol=1e-4, atol=1e-5)


def test_a_score_is_its_own_latents_prompts_and_times(preference: LatentPreference):
    scorer, order = LatentScorer(preference), torch.tensor([2, 0, 1])
    x, t, text = latents(3), torch.tensor([1, 401, 951]), scorer.encode(PROMPTS)
    scores = scorer.score_latents(x, t, text)
    torch.testing.assert_close(
        scorer.score_latents(x[order], t[order], text[order]), scores[order], rtol=1e-4, atol=1e-5
    )
    for changed in (
        scorer.score_latents(latents(3, seed=9), t, text),
        scorer.score_latents(x, t + 40, text),
        scorer.score_latents(x, t, text[order]),
    ):
        assert (changed - scores).abs().min() > 1e-5


def test_half_precision_comes_near_and_leaves_the_weights_alone(preference: LatentPreference):
    x, t = latents(3), torch.tensor([1, 401, 951])
    full, half = LatentScorer(preference), LatentScorer(preference, dtype=torch.bfloat16)
    scores = half.score_latents(x, t, half.encode(PROMPTS))
    assert scores.dtype == torch.float32
    expected = full.score_latents(x, t, full.encode(PROMPTS))
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.3)
    assert {parameter.dtype for parameter in preference.model.parameters()} == {torch.float32}


@pytest.mark.gpu
def test_the_gpu_gives_the_scores_of_the_cpu(preference: LatentPreference):
    x, t = latents(3), torch.tensor([1, 401, 951])
    here = LatentScorer(preference)
    expected = here.score_latents(x, t, here.encode(PROMPTS))
    there = LatentScorer(preference, device="cuda")
    torch.testing.assert_close(there.score_latents(x, t, there.encode(PROMPTS)).cpu(), expected, rtol=1e-3, atol=1e-3)
