"""LoRA files mean the same to us, to plain diffusers and to web user interfaces."""

from itertools import product
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from spo.config import LoraConfig
from spo.errors import ModelError
from spo.models.lora import add_lora, load_lora, published_lora, save_kohya, save_lora
from spo.models.lora_file import WEIGHTS
from tests.models.sampled import RANK, close, ours, theirs
from tests.models.tiny import DIFFUSION, FLOWS, make_tiny_denoiser, shake


@pytest.mark.parametrize("save", [save_lora, save_kohya])
def test_saved_lora_changes_plain_diffusers_exactly_as_the_policy(policy, plain_pipeline, tmp_path, save):
    target = tmp_path / ("lora.safetensors" if save is save_kohya else "lora")
    save(policy.network, target)
    before = theirs(plain_pipeline)
    plain_pipeline.load_lora_weights(str(target))
    after = theirs(plain_pipeline)
    assert (after - before).abs().max() > 0.05
    close(ours(policy), after)


@pytest.mark.parametrize("save", [save_lora, save_kohya])
def test_saved_lora_comes_back_bit_by_bit_and_trainable(policy, make, tmp_path, save):
    target = tmp_path / ("lora.safetensors" if save is save_kohya else "lora")
    save(policy.network, target)
    other = make()
    base = ours(other)
    add_lora(other.network.module, LoraConfig(rank=8), seed=3)  # to be replaced
    load_lora(other.network, target)
    weights = zip(other.network.parameters(), policy.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    close(ours(other), ours(policy))
    with other.reference():
        assert torch.equal(ours(other), base)


@pytest.mark.parametrize("save", [save_lora, save_kohya])
def test_lora_over_a_half_precision_base_is_saved_and_loaded_in_float32(make, tmp_path, save):
    policy, other = make(dtype="bfloat16"), make(dtype="bfloat16")
    add_lora(policy.network.module, LoraConfig(rank=RANK), seed=0)
    shake(policy)
    target = tmp_path / ("lora.safetensors" if save is save_kohya else "lora")
    save(policy.network, target)
    load_lora(other.network, target)
    assert {p.dtype for p in other.network.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(policy.network.parameters(), other.network.parameters(), strict=True))


@pytest.mark.parametrize("family", DIFFUSION)
def test_kohya_file_has_the_names_and_alphas_that_web_interfaces_look_for(policy, tmp_path):
    save_kohya(policy.network, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    stems = {name.split(".")[0] for name in state}
    assert set(state) == {f"{stem}.{end}" for stem in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q" in stems
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in stems
    assert all(value == RANK for name, value in state.items() if name.endswith(".alpha"))
    assert 2 * len(stems) == len(policy.network.parameters())


@pytest.mark.parametrize("family", FLOWS)
def test_file_of_a_transformer_has_the_names_that_comfyui_looks_for(policy, tmp_path):
    """ComfyUI: `transformer.` and diffusers' name of a layer, then lora_A and lora_B; without alpha the scale is 1."""
    save_kohya(policy.network, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    layers = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    assert set(state) == {f"{layer}.{end}" for layer in layers for end in ("lora_A.weight", "lora_B.weight")}
    attention = "transformer.transformer_blocks.0.attn"
    expected = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert {name for name in layers if name.startswith(f"{attention}.")} == {f"{attention}.{name}" for name in expected}
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert 2 * len(layers) == len(policy.network.parameters())


@pytest.mark.parametrize("family", DIFFUSION)
def test_alpha_below_the_rank_weakens_a_kohya_lora_as_in_diffusers(policy, make, plain_pipeline, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_kohya(policy.network, file)
    state = load_file(file)
    save_file({name: value / 2 if name.endswith(".alpha") else value for name, value in state.items()}, file)
    other = make()
    load_lora(other.network, file)
    plain_pipeline.load_lora_weights(str(file))
    assert (ours(other) - ours(policy)).abs().max() > 0.01
    close(ours(other), theirs(plain_pipeline))


def test_missing_or_unsafe_lora_is_refused_in_one_line(make, policy, tmp_path):
    denoiser = make()
    torch.save({"x": torch.zeros(1)}, tmp_path / "lora.bin")
    save_lora(policy.network, tmp_path / "lora")
    for source, weight_name in [
        (tmp_path / "nothing", None),
        (tmp_path, None),
        (tmp_path / "lora.bin", None),
        (tmp_path, "lora.bin"),
        (tmp_path / "lora", "other.safetensors"),
    ]:
        with pytest.raises(ModelError) as caught:
            if weight_name is None:
                load_lora(denoiser.network, source)
            else:
                published_lora(denoiser.network, source, weight_name=weight_name).__enter__()
        assert "\n" not in str(caught.value)
        assert "safetensors" in str(caught.value)
    assert denoiser.network.parameters() == []


def test_lora_of_another_base_is_refused(tiny_folder, tmp_path):
    small, large = (make_tiny_denoiser(family, tiny_folder(family)) for family in ("sd15", "sdxl"))
    add_lora(small.network.module, LoraConfig(rank=RANK), seed=0)
    save_lora(small.network, tmp_path / "lora")
    with pytest.raises(ModelError, match="same base model"):
        load_lora(large.network, tmp_path / "lora")


def test_lora_of_a_text_encoder_is_refused(make, policy, tmp_path):
    save_lora(policy.network, tmp_path / "lora")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(state, file)
    with pytest.raises(ModelError, match=r"changes \['text_encoder'\]"):
        load_lora(make().network, file)


def test_failed_save_leaves_the_former_lora(policy, tmp_path, monkeypatch):
    save_lora(policy.network, tmp_path / "lora")
    before = Path(tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(type(policy.network.pipeline), "save_lora_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        save_lora(policy.network, tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def renamed(policy, folder: Path, *changes: tuple[str, str]) -> Path:
    """The policy's LoRA under the names of older writers."""
    save_lora(policy.network, folder / "new")
    state = load_file(folder / "new" / WEIGHTS)
    for old, new in changes:
        state = {name.replace(old, new): weight for name, weight in state.items()}
    save_file(state, folder / "old.safetensors")
    return folder / "old.safetensors"


@pytest.mark.parametrize(
    ("family", "names"),
    [*product(DIFFUSION, ("diffusers", "kohya", "peft", "processors")), *product(FLOWS, ("diffusers", "kohya"))],
)
def test_a_borrowed_lora_acts_as_in_plain_diffusers_and_is_given_back(policy, make, plain_pipeline, tmp_path, names):
    match names:
        case "diffusers":
            save_lora(policy.network, source := tmp_path / "lora")
        case "kohya":
            save_kohya(policy.network, source := tmp_path / "lora.safetensors")
        case "peft":
            source = renamed(policy, tmp_path, ("lora.down", "lora_A"), ("lora.up", "lora_B"))
        case "processors":
            ends = (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out"))
            source = renamed(policy, tmp_path, *((f"{new}.lora.", f"processor.{old}_lora.") for new, old in ends))
    denoiser = make()
    base = theirs(denoiser.network.pipeline)
    add_lora(denoiser.network.module, LoraConfig(rank=8), seed=3)
    shake(denoiser)
    with published_lora(denoiser.network, source):
        borrowed = theirs(denoiser.network.pipeline)
    assert torch.equal(theirs(denoiser.network.pipeline), base)
    plain_pipeline.load_lora_weights(str(source))
    assert (borrowed - base).abs().max() > 0.05
    # plain diffusers keeps weights in another order in memory
    torch.testing.assert_close(borrowed, theirs(plain_pipeline), rtol=1e-4, atol=1e-4)


def with_text_encoder(policy, folder: Path, prefix: str) -> Path:
    save_lora(policy.network, folder)
    state = load_file(folder / WEIGHTS)
    layer = f"{prefix}.text_model.encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = torch.randn(2, 2, 32, generator=generator)
    state[f"{layer}.lora_B.weight"] = state[f"{layer}.lora_B.weight"].T.contiguous()
    save_file(state, folder / WEIGHTS)
    return folder


def test_a_borrowed_lora_may_change_the_text_encoders(policy, make, plain_pipeline, family, tmp_path):
    prefix = "text_encoder_2" if family in ("sdxl", "sd3") else "text_encoder"
    source = with_text_encoder(policy, tmp_path / "lora", prefix)
    denoiser = make()
    base = theirs(denoiser.network.pipeline)
    with published_lora(denoiser.network, source):
        borrowed = theirs(denoiser.network.pipeline)
    assert torch.equal(theirs(denoiser.network.pipeline), base)
    plain_pipeline.load_lora_weights(str(source))
    # plain diffusers keeps weights in another order in memory
    torch.testing.assert_close(borrowed, theirs(plain_pipeline), rtol=1e-4, atol=1e-4)
    save_lora(policy.network, tmp_path / "without")
    with published_lora(denoiser.network, tmp_path / "without"):
        assert not torch.equal(theirs(denoiser.network.pipeline), borrowed)


def test_a_borrowed_lora_of_a_text_encoder_that_is_not_there_is_refused(tiny_folder, tmp_path):
    denoiser = make_tiny_denoiser("sd15", tiny_folder("sd15"))
    add_lora(denoiser.network.module, LoraConfig(rank=RANK), seed=0)
    source = with_text_encoder(denoiser, tmp_path / "lora", "text_encoder_2")
    with (
        pytest.raises(ModelError, match="changes a text_encoder_2, which this model lacks"),
        published_lora(denoiser.network, source),
    ):
        pass
    assert denoiser.network.parameters() == []


def test_a_borrowed_lora_that_is_not_there_says_what_to_fetch(make, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    denoiser = make()
    for source, said in [
        ("someone/no-such-lora", 'run `hf download .* models/no-such-lora --include "a.safetensors" --include'),
        (str(tmp_path / "nothing"), "safetensors"),
        (str(tmp_path), "safetensors"),
    ]:
        with (
            pytest.raises(ModelError, match=said) as caught,
            published_lora(denoiser.network, source, weight_name="a.safetensors"),
        ):
            pass
        assert "\n" not in str(caught.value)


def test_a_borrowed_lora_of_another_base_is_refused(tiny_folder, tmp_path):
    small, large = (make_tiny_denoiser(family, tiny_folder(family)) for family in ("sd15", "sdxl"))
    add_lora(small.network.module, LoraConfig(rank=RANK), seed=0)
    save_lora(small.network, tmp_path / "lora")
    with pytest.raises(ModelError, match="same base model"), published_lora(large.network, tmp_path / "lora"):
        pass
