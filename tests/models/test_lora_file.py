"""Whoever wrote a LoRA, loading and exporting it keeps its weight change, and what cannot be applied is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.errors import ModelError
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.lora import load_lora, published_lora, save_kohya, save_lora
from spo.models.lora_file import PEFT_WEIGHTS, WEIGHTS
from tests.hostile.trying import assert_one_line, tries
from tests.models.sampled import SAMPLING
from tests.models.tiny import load_plainly, make_tiny_denoiser

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LINEAR = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.2")
CONV = "down_blocks.0.resnets.0.conv1"  # LoCon


@pytest.fixture(scope="module")
def denoiser(tiny_folder: Callable[..., Path]) -> LatentDiffusion:
    return make_tiny_denoiser("sd15", tiny_folder("sd15"), sampling=SAMPLING)


@pytest.fixture
def file(denoiser: LatentDiffusion, tmp_path: Path) -> Path:
    """A LoRA of one layer in kohya's layout."""
    path = tmp_path / "lora.safetensors"
    save_file(in_kohya(*drawn(denoiser, {LINEAR[0]: 2}), {LINEAR[0]: 1.0}), path)
    return path


def drawn(denoiser: LatentDiffusion, ranks: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random down and up weights of each layer."""
    generator = torch.Generator().manual_seed(0)
    down, up = {}, {}
    for name, rank in ranks.items():
        out, *inner = denoiser.network.module.get_submodule(name).weight.shape
        down[name] = torch.randn(rank, *inner, generator=generator)
        up[name] = torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator)
    return down, up


def in_kohya(down: dict[str, Tensor], up: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Tensor]:
    state = {}
    for name in down:
        stem = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down[name], f"{stem}.lora_up.weight": up[name]}
        if name in alphas:
            state[f"{stem}.alpha"] = torch.tensor(alphas[name])
    return state


def changes(module: Any) -> dict[str, Tensor]:
    """What the adapter adds to each weight."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.get_delta_weight(layer.active_adapters[0]) for name, layer in layers.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-5)


@tries(12)
@given(data=st.data(), layout=st.sampled_from(["kohya", "diffusers", "peft"]))
def test_any_lora_keeps_its_weight_change_when_it_is_loaded_and_exported(
    denoiser: LatentDiffusion,
    tiny_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    layout: str,
) -> None:
    ranks = data.draw(st.dictionaries(st.sampled_from([*LINEAR, CONV]), st.integers(1, 5), min_size=1))
    alpha = st.sampled_from([0.5, 1.0, 3.0, 4.0, 16.0])
    rslora = layout != "kohya" and data.draw(st.booleans())
    down, up = drawn(denoiser, ranks)
    folder = tmp_path_factory.mktemp("lora")
    if layout == "kohya":
        alphas = data.draw(st.dictionaries(st.sampled_from(sorted(ranks)), alpha))
        save_file(in_kohya(down, up, alphas), folder / "lora.safetensors")
    else:
        common, own = data.draw(alpha), data.draw(st.dictionaries(st.sampled_from(sorted(ranks)), alpha))
        alphas = dict.fromkeys(ranks, common) | own
        settings = {"r": 4, "lora_alpha": common, "alpha_pattern": own, "use_rslora": rslora, "rank_pattern": ranks}
        prefix = "unet." if layout == "diffusers" else "base_model.model."
        state = {f"{prefix}{name}.lora_A.weight": weight for name, weight in down.items()}
        state |= {f"{prefix}{name}.lora_B.weight": weight for name, weight in up.items()}
        if layout == "diffusers":
            text = json.dumps({f"unet.{key}": value for key, value in settings.items()})
            save_file(state, folder / WEIGHTS, {"lora_adapter_metadata": text})
        else:
            save_file(state, folder / PEFT_WEIGHTS)
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    expected = {}
    for name, rank in ranks.items():
        scale = alphas.get(name, rank) / (rank**0.5 if rslora else rank)
        weight = denoiser.network.module.get_submodule(name).weight
        expected[name] = scale * (up[name].flatten(1) @ down[name].flatten(1)).view(weight.shape)
    with published_lora(denoiser.network, folder):
        assert_same(changes(denoiser.network.module), expected)
    load_lora(denoiser.network, folder)
    assert_same(changes(denoiser.network.module), expected)
    plain = load_plainly(tiny_folder("sd15"))
    for save, name in ((save_kohya, "out.safetensors"), (save_lora, "out")):
        save(denoiser.network, folder / name)
        plain.load_lora_weights(str(folder / name))
        assert_same(changes(plain.unet), expected)
        plain.unload_lora_weights()


@pytest.fixture(params=["loaded", "borrowed"])
def refused(request: pytest.FixtureRequest, denoiser: LatentDiffusion) -> Callable[[Path], str]:
    """refused(source): the one line that says why neither the policy nor an evaluated column is this LoRA."""

    def error(source: Path) -> str:
        with pytest.raises(ModelError) as caught:
            if request.param == "loaded":
                load_lora(denoiser.network, source)
            else:
                with published_lora(denoiser.network, source):
                    pass
        assert_one_line(caught.value)
        return str(caught.value)

    return error


def test_what_no_lora_has_is_refused(file: Path, refused: Callable[[Path], str]) -> None:
    stem = f"lora_unet_{LINEAR[0].replace('.', '_')}"
    for name in (f"{stem}.dora_scale", f"{stem}.lora_mid.weight", f"{stem}.hada_w1_a", "x"):
        save_file({**load_file(file), name: torch.zeros(2, 2)}, file)
        assert f"holds {name}, which cannot be applied" in refused(file)
        save_file({key: value for key, value in load_file(file).items() if key != name}, file)
    save_file({}, file)
    assert "lora.safetensors" in refused(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(file: Path, refused: Callable[[Path], str], value: float) -> None:
    state = load_file(file)
    name = next(name for name in state if name.endswith("lora_up.weight"))
    state[name][0, 0] = value
    save_file(state, file)
    assert f"{name} holds values that are not finite" in refused(file)


def test_a_lora_that_fits_no_layer_or_not_all_is_refused(
    denoiser: LatentDiffusion, tmp_path: Path, refused: Callable[[Path], str]
) -> None:
    down, up = drawn(denoiser, {LINEAR[0]: 2})
    good = {f"unet.{LINEAR[0]}.lora_A.weight": down[LINEAR[0]], f"unet.{LINEAR[0]}.lora_B.weight": up[LINEAR[0]]}
    elsewhere = {name.replace("down_blocks.1", "down_blocks.7"): weight.clone() for name, weight in good.items()}
    source = tmp_path / "lora.safetensors"
    for state in (elsewhere, {**good, **elsewhere}):
        save_file(state, source)
        assert "same base model" in refused(source)
    save_file({name.removeprefix("unet."): weight for name, weight in good.items()}, source)
    assert "fits no layer" in refused(source)


def test_peft_weights_without_their_settings_are_refused(
    denoiser: LatentDiffusion, tmp_path: Path, refused: Callable[[Path], str]
) -> None:
    down, up = drawn(denoiser, {LINEAR[0]: 2})
    name = f"base_model.model.{LINEAR[0]}"
    state = {f"{name}.lora_A.weight": down[LINEAR[0]], f"{name}.lora_B.weight": up[LINEAR[0]]}
    save_file(state, tmp_path / PEFT_WEIGHTS)
    assert "adapter_config.json is missing; put it beside the weights" in refused(tmp_path)
