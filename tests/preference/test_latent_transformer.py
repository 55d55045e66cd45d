"""The latent preference model of flow models: features of the first blocks of a transformer."""

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from spo.config import LoraConfig, ModelConfig
from spo.errors import ModelError
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import add_lora
from spo.preference.latent_transformer import TransformerPreference, first_blocks
from spo.training.latent_preference import load_latent
from tests.models.tiny import FLOWS, make_tiny_denoiser, make_tiny_pipeline

PROMPTS = ["a cat", "a dog", "a hen"]
T = torch.tensor([901.0, 500.5, 1.0])


@pytest.fixture(scope="module", params=FLOWS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return make_tiny_denoiser(family, make_tiny_pipeline(family, tmp_path_factory.mktemp("base")))


def make(base: LatentDiffusion, family: str, *, guidance_scale: float = 1.0, layers: int | None = 1):
    return TransformerPreference.from_network(
        base.network,
        family=family,
        vae=base.autoencoder.vae,
        layers=layers,
        projection_size=16,
        guidance_scale=guidance_scale,
        generator=Generator().manual_seed(0),
    )


def latents() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=Generator().manual_seed(1))


@torch.no_grad()
def test_the_features_are_those_inside_the_whole_transformer(base: LatentDiffusion, family: str) -> None:
    preference, cond, seen = make(base, family), base.encode(PROMPTS), []
    block = base.network.module.transformer_blocks[0]
    hook = block.register_forward_hook(lambda _, __, outputs: seen.append(outputs[1].mean(dim=1)))
    base.network.predict(latents(), T, cond, guidance_scale=1.0)
    hook.remove()
    found = preference.model.pooled_features(latents(), T, preference.encode(PROMPTS))
    torch.testing.assert_close(found, seen[0], rtol=1e-5, atol=1e-6)
    two = make(base, family, layers=2)
    assert (two.model.pooled_features(latents(), T, two.encode(PROMPTS)) - found).abs().max() > 1e-3


@torch.no_grad()
def test_features_are_guided_from_the_empty_prompt_unless_guidance_is_distilled(
    base: LatentDiffusion, family: str
) -> None:
    plain, guided = make(base, family), make(base, family, guidance_scale=7.5)
    text = plain.model.pooled_features(latents(), T, plain.encode(PROMPTS))
    null = plain.model.pooled_features(latents(), T, plain.encode([""] * 3))
    expected = text if base.network.is_distilled else null + 7.5 * (text - null)
    found = guided.model.pooled_features(latents(), T, guided.encode(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_saved_model_scores_the_same(base: LatentDiffusion, family: str, tmp_path: Path) -> None:
    preference = make(base, family, guidance_scale=7.5)
    preference.save(tmp_path / "model")
    config = ModelConfig(family=family, path="-", resolution=16)
    again = load_latent(tmp_path / "model", base.network, config)
    scores = [each.model.score(latents(), T, each.encode(PROMPTS)) for each in (preference, again)]
    assert torch.equal(scores[0], scores[1])
    assert scores[0].unique().numel() == 3
    other = next(name for name in FLOWS if name != family)
    with pytest.raises(ModelError, match=f"of family {family}, not of {other}"):
        load_latent(tmp_path / "model", base.network, ModelConfig(family=other, path="-", resolution=16))
    with pytest.raises(ModelError, match=f"of family {family}, not of"):
        load_latent(tmp_path / "model", base.network, ModelConfig(family="sd15", path="-", resolution=16))
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is a damaged preference model"):
        load_latent(tmp_path / "model", base.network, config)


def test_checkpointed_gradients_are_the_same(base: LatentDiffusion, family: str) -> None:
    def gradients(checkpointing: bool) -> Tensor:
        model = make(base, family).model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.score(latents(), T, model.encode(PROMPTS)).sum().backward()
        assert model.visual_projection.weight.grad is not None and model.text_projection.weight.grad is not None
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    plain = gradients(False)
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradients(True), plain, rtol=1e-4, atol=1e-6)


def test_more_blocks_than_there_are_and_a_lora_are_refused(family: str, tmp_path: Path) -> None:
    fresh = make_tiny_denoiser(family, make_tiny_pipeline(family, tmp_path / "fresh"))
    with pytest.raises(ModelError, match="layers=3 is more than the 2 joint blocks"):
        first_blocks(fresh.network.module, 3)
    assert len(first_blocks(fresh.network.module, None).transformer_blocks) == 2  # three quarters, rounded
    add_lora(fresh.network.module, LoraConfig(rank=2), seed=0)
    with pytest.raises(ValueError, match="has a LoRA"):
        first_blocks(fresh.network.module, 1)
