"""Sizes that are counted without weights equal those of loaded models, and of the published ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spo.commands import architectures as shapes
from spo.config import LatentPreferenceConfig, LoraConfig, ModelConfig, PixelPreferenceConfig, load_config
from spo.models.load import build
from spo.models.lora import add_lora
from spo.preference.checkpoint import load_clip
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_transformer import TransformerPreference

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # millions of weights: the network, the text encoders, the autoencoder
    "sd15": (859.5, [123.1], 83.7),
    "sdxl": (2567.5, [123.1, 694.7], 83.7),
    "sd35": (2243.2, [123.7, 694.7, 4762.3], 83.8),
    "flux": (11901.4, [123.1, 4762.3], 83.8),
}


def millions(*modules: nn.Module) -> float:
    return round(shapes.weights(*modules) / 1e6, 1)


@pytest.mark.parametrize("profile", PUBLISHED)
def test_a_base_that_is_not_at_hand_has_the_published_sizes(profile: str) -> None:
    model, (network, encoders, vae) = load_config(ROOT, profile).model, PUBLISHED[profile]
    assert millions(shapes.network_of(model)) == network
    assert [millions(each) for each in shapes.text_encoders_of(model)] == encoders
    assert millions(shapes.part_of(model, "vae")) == vae
    assert shapes.latent_size(model)[1:] == tuple(side // 8 for side in model.size)


def test_the_other_published_sizes_are_known() -> None:
    sd35 = load_config(ROOT, "sd35").model
    large = sd35.model_copy(update={"path": "stabilityai/stable-diffusion-3.5-large", "t5": False})
    assert millions(shapes.network_of(large)) == 8056.6
    assert len(shapes.text_encoders_of(large)) == 2
    assert millions(shapes.clip_of(None)) == 986.1
    assert millions(shapes.step_aware(None)) == 1306.2


@pytest.mark.parametrize("profile", ["tiny", "tiny-flow"])
def test_the_counts_are_those_of_the_loaded_model(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT, profile)
    base = build(config.model, config.sampling, "cpu")
    network, pipeline = base.network.module, base.network.pipeline
    assert shapes.weights(shapes.network_of(config.model)) == shapes.weights(network)
    assert shapes.weights(shapes.part_of(config.model, "vae")) == shapes.weights(pipeline.vae)
    names = [name for name in shapes.TEXT_ENCODERS if isinstance(pipeline.components.get(name), nn.Module)]
    encoders = [pipeline.components[name] for name in names]
    assert [*map(shapes.weights, shapes.text_encoders_of(config.model))] == [*map(shapes.weights, encoders)]
    assert shapes.latent_size(config.model) == base.latent_shape
    latent = LatentPreferenceConfig()
    generator = torch.Generator().manual_seed(0)
    if config.model.is_flow:
        sizes: dict[str, Any] = {"layers": None, "projection_size": None, "guidance_scale": 7.5}
        preference: Any = TransformerPreference.from_network(
            base.network, family=config.model.family, vae=pipeline.vae, generator=generator, **sizes
        )
    else:
        preference = LatentPreference.from_pipeline(pipeline, generator=generator)
    assert shapes.preference_weights(config.model, latent) == shapes.weights(preference.model)
    lora = LoraConfig(rank=3)
    counted = shapes.lora_weights(shapes.network_of(config.model), lora)
    add_lora(network, lora, seed=0)
    assert counted == sum(weight.numel() for weight in base.network.parameters())


def test_a_pixel_model_has_the_clip_and_its_adaptive_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    start, model = "data/base/tiny-preference", load_config(ROOT, "tiny").model
    counted = shapes.preference_weights(model, PixelPreferenceConfig(start_from=start))
    assert counted == shapes.weights(load_clip(start).model)


def test_a_layer_of_convolution_counts_as_peft_makes_it() -> None:
    network = shapes.network_of(load_config(ROOT, "sd15").model)
    lora = LoraConfig(rank=2, targets=("conv_in",))
    assert shapes.lora_weights(network, lora) == 2 * (4 * 3 * 3 + 320)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"_class_name": "UNet2DConditionModel", "block_out_channels": 3}'])
def test_a_broken_configuration_counts_as_the_published_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(text)
    assert millions(shapes.network_of(ModelConfig(family="sd15", path=str(tmp_path), resolution=512))) == 859.5


def test_checkpointing_keeps_the_blocks_results_and_the_inside_of_the_largest() -> None:
    of = {"in": 1, "a.x": 10, "a.y": 20, "b.x": 5, "out": 2}
    found = shapes.Outputs(of, blocks={"a": 3, "b": 4}, largest=20, products={})
    assert found.kept(checkpointing=False) == 38
    assert found.kept(checkpointing=True) == 1 + 2 + (3 + 4) + (10 + 20)
    assert found.kept(checkpointing=True, leave_out=("a.", "out")) == 1 + 4 + 5
