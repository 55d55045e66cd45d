"""LoRA files mean the same to us, to plain diffusers and to web user interfaces."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from spo.config import LoraConfig, SamplingConfig
from spo.errors import ModelError
from spo.models.lora import add_lora, load_lora, save_kohya, save_lora, save_merged
from tests.models.tiny import RESOLUTION, draw_latents, make_tiny_denoiser, sample_ddim, shake

PROMPTS = ["a red house", "fog"]
SAMPLING = SamplingConfig(steps=2, eta=0.0)
RANK = 2


@pytest.fixture
def make(family, tiny_folder):
    return lambda **model: make_tiny_denoiser(family, tiny_folder(family), sampling=SAMPLING, **model)


@pytest.fixture
def policy(make):
    """A denoiser whose LoRA is not zero."""
    denoiser = make()
    add_lora(denoiser.unet, LoraConfig(rank=RANK), seed=0)
    shake(denoiser)
    return denoiser


@pytest.fixture
def plain_pipeline(family, tiny_folder):
    """Without any of our code."""
    kind = StableDiffusionPipeline if family == "sd15" else StableDiffusionXLPipeline
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = kind.from_pretrained(tiny_folder(family), **(more if family == "sd15" else {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(denoiser):
    return sample_ddim(denoiser, draw_latents(denoiser, 2), denoiser.encode(PROMPTS))


def theirs(pipeline):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    size = {"height": RESOLUTION, "width": RESOLUTION}
    return pipeline(
        PROMPTS, latents=latents, num_inference_steps=2, guidance_scale=5.0, output_type="latent", **size
    ).images


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("save", [save_lora, save_kohya])
def test_saved_lora_changes_plain_diffusers_exactly_as_the_policy(policy, plain_pipeline, tmp_path, save):
    target = tmp_path / ("lora.safetensors" if save is save_kohya else "lora")
    save(policy, target)
    before = theirs(plain_pipeline)
    plain_pipeline.load_lora_weights(str(target))
    after = theirs(plain_pipeline)
    assert (after - before).abs().max() > 0.1
    close(ours(policy), after)


@pytest.mark.parametrize("save", [save_lora, save_kohya])
def test_saved_lora_comes_back_bit_by_bit_and_trainable(policy, make, tmp_path, save):
    target = tmp_path / ("lora.safetensors" if save is save_kohya else "lora")
    save(policy, target)
    other = make()
    base = ours(other)
    add_lora(other.unet, LoraConfig(rank=8), seed=3)  # to be replaced
    load_lora(other, target)
    assert torch.equal(ours(other), ours(policy))
    assert [p.shape for p in other.parameters()] == [p.shape for p in policy.parameters()]
    with other.reference():
        assert torch.equal(ours(other), base)


@pytest.mark.parametrize("save", [save_lora, save_kohya])
def test_lora_over_a_half_precision_base_is_saved_and_loaded_in_float32(make, tmp_path, save):
    policy, other = make(dtype="bfloat16"), make(dtype="bfloat16")
    add_lora(policy.unet, LoraConfig(rank=RANK), seed=0)
    shake(policy)
    target = tmp_path / ("lora.safetensors" if save is save_kohya else "lora")
    save(policy, target)
    load_lora(other, target)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


def test_kohya_file_has_the_names_and_alphas_that_web_interfaces_look_for(policy, tmp_path):
    save_kohya(policy, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    stems = {name.split(".")[0] for name in state}
    assert set(state) == {f"{stem}.{end}" for stem in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q" in stems
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in stems
    assert all(value == RANK for name, value in state.items() if name.endswith(".alpha"))
    assert 2 * len(stems) == len(policy.parameters())


def test_alpha_below_the_rank_weakens_a_kohya_lora_as_in_diffusers(policy, make, plain_pipeline, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_kohya(policy, file)
    state = load_file(file)
    save_file({name: value / 2 if name.endswith(".alpha") else value for name, value in state.items()}, file)
    other = make()
    load_lora(other, file)
    plain_pipeline.load_lora_weights(str(file))
    assert (ours(other) - ours(policy)).abs().max() > 0.01
    close(ours(other), theirs(plain_pipeline))


def test_merged_pipeline_is_the_policy_without_an_adapter(policy, family, tmp_path):
    before = [p.clone() for p in policy.unet.parameters()]
    save_merged(policy, tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.unet.parameters(), strict=True))
    merged = make_tiny_denoiser(family, tmp_path / "merged", sampling=SAMPLING)
    assert not any("lora" in name for name, _ in merged.unet.named_parameters())
    assert policy.pipeline.unet is policy.unet
    close(ours(merged), ours(policy))


def test_merged_pipeline_of_full_fine_tuning_is_the_policy(make, family, tmp_path):
    policy = make()
    policy.unfreeze()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    save_merged(policy, tmp_path / "merged")
    close(ours(make_tiny_denoiser(family, tmp_path / "merged", sampling=SAMPLING)), ours(policy))


def test_missing_or_unsafe_lora_is_refused_in_one_line(make, policy, tmp_path):
    denoiser = make()
    torch.save({"x": torch.zeros(1)}, tmp_path / "lora.bin")
    save_lora(policy, tmp_path / "lora")
    for source, weight_name in [
        (tmp_path / "nothing", None),
        (tmp_path, None),
        (tmp_path / "lora.bin", None),
        (tmp_path, "lora.bin"),
        (tmp_path / "lora", "other.safetensors"),
    ]:
        with pytest.raises(ModelError) as caught:
            load_lora(denoiser, source, weight_name=weight_name)
        assert "\n" not in str(caught.value)
        assert "safetensors" in str(caught.value)
    assert denoiser.parameters() == []


def test_lora_of_another_base_is_refused(tiny_folder, tmp_path):
    small, large = (make_tiny_denoiser(family, tiny_folder(family)) for family in ("sd15", "sdxl"))
    add_lora(small.unet, LoraConfig(rank=RANK), seed=0)
    save_lora(small, tmp_path / "lora")
    with pytest.raises(ModelError, match="same base model"):
        load_lora(large, tmp_path / "lora")


def test_lora_of_a_text_encoder_is_refused(make, policy, tmp_path):
    save_lora(policy, tmp_path / "lora")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(state, file)
    with pytest.raises(ModelError, match=r"changes \['text_encoder'\]"):
        load_lora(make(), file)


def test_failed_save_leaves_the_former_lora(policy, tmp_path, monkeypatch):
    save_lora(policy, tmp_path / "lora")
    before = Path(tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(type(policy.pipeline), "save_lora_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        save_lora(policy, tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
