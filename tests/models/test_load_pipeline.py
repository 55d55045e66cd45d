"""Pipelines come from safe files of the right family, and what is wrong is said in one line."""

import re
import shlex
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from safetensors.torch import load_file, save_file

from spo.config import ModelConfig, SamplingConfig
from spo.errors import ModelError
from spo.models.load import NETWORKS, PIPELINES, build, files_of, load_pipeline, load_tiny_vae
from spo.models.schedulers import plain_scheduler
from spo.runtime import progress
from tests.models.single_file import save_single_file
from tests.models.tiny import (
    DIFFUSION,
    FAMILIES,
    FLOWS,
    RESOLUTION,
    load_plainly,
    make_tiny_denoiser,
    make_tiny_pipeline,
)


def config(family, path, **more):
    return ModelConfig(family=family, path=str(path), resolution=RESOLUTION, **more)


def message(*args, **more):
    with pytest.raises(ModelError) as caught:
        load_pipeline(config(*args, **more), "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_resolution_that_latents_cannot_have_is_refused(family, tiny_folder):
    odd = config(family, tiny_folder(family)).model_copy(update={"resolution": 17})
    multiple = 4 if family in FLOWS else 2  # with the transformer's patches
    with pytest.raises(ModelError, match=f"resolution=17 must be a multiple of {multiple}"):
        build(odd, SamplingConfig(), "cpu")


def test_family_decides_pipeline_and_network(family, tiny_folder):
    denoiser = build(config(family, tiny_folder(family)), SamplingConfig(), "cpu")
    assert set(NETWORKS) == set(PIPELINES) == set(FAMILIES)
    assert (type(denoiser.network), type(denoiser.network.pipeline)) == (NETWORKS[family], PIPELINES[family])
    assert denoiser.latent_shape == (4, 8, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_networks_have_the_configured_dtype(family, tiny_folder, dtype):
    pipeline = load_pipeline(config(family, tiny_folder(family), dtype=dtype), "cpu")
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {part.dtype for part in networks} == {getattr(torch, dtype)}


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # diffusers' own call of its own
def test_vae_that_overflows_in_float16_runs_in_float32_beside_the_pipelines_own(tiny_folder):
    sdxl, sd15 = (make_tiny_denoiser(family, tiny_folder(family), dtype="float16") for family in ("sdxl", "sd15"))
    assert sdxl.autoencoder.vae.dtype == torch.float32
    assert sdxl.network.pipeline.vae.dtype == sd15.autoencoder.vae.dtype == torch.float16
    options = {"num_inference_steps": 2, "height": RESOLUTION, "width": RESOLUTION, "output_type": "pt"}
    for denoiser in (sdxl, sd15):
        assert denoiser.decode(torch.zeros(1, *denoiser.latent_shape)).isfinite().all()
        assert denoiser.network.pipeline("fog", **options).images.isfinite().all()


def test_sd3_can_leave_t5_out_and_flux_cannot(tiny_folder, tmp_path):
    pipeline, flux = (load_plainly(tiny_folder(family)) for family in FLOWS)
    pipeline.register_modules(text_encoder_3=flux.text_encoder_2, tokenizer_3=flux.tokenizer_2)
    pipeline.save_pretrained(tmp_path)
    assert load_pipeline(config("sd3", tmp_path), "cpu").text_encoder_3 is not None
    assert load_pipeline(config("sd3", tmp_path, t5=False), "cpu").text_encoder_3 is None
    with pytest.raises(ValueError, match="t5=false is for family sd3; flux has no text encoder"):
        config("flux", "x", t5=False)
    with pytest.raises(ValueError, match="t5_tokens=8 is for families sd3 and flux"):
        config("sd15", "x", t5_tokens=8)


@pytest.mark.parametrize("family", DIFFUSION)
def test_any_scheduler_becomes_unclipped_ddim_of_the_same_noise_schedule(family, tmp_path):
    folder = make_tiny_pipeline(family, tmp_path / "model")
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    euler.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "EulerDiscreteScheduler"))
    denoiser = make_tiny_denoiser(family, folder)
    assert type(denoiser.network.pipeline.scheduler) is DDIMScheduler
    assert denoiser.network.pipeline.scheduler.config.clip_sample is False
    assert denoiser.timesteps.tolist() == [801, 601, 401, 201, 1]
    torch.testing.assert_close(denoiser.sampler.schedule.alpha_bar, euler.alphas_cumprod)


@pytest.mark.parametrize("family", FLOWS)
def test_any_flow_scheduler_becomes_eulers(family, tmp_path):
    folder = make_tiny_pipeline(family, tmp_path / "model")
    FlowMatchHeunDiscreteScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"))
    scheduler = load_pipeline(config(family, folder), "cpu").scheduler
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert scheduler.config.shift == 2.0


@pytest.mark.parametrize(
    ("family", "scheduler", "said"),
    [
        ("sd15", EDMEulerScheduler(), "EDMEulerScheduler .* is not for family sd15; the family that fits is none of"),
        ("sdxl", FlowMatchEulerDiscreteScheduler(), "FlowMatchEuler.* is not for family sdxl; .* fits is sd3 or flux"),
        ("sd15", DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "sd3 or flux"),
        ("sd3", EulerDiscreteScheduler(), "EulerDiscreteScheduler .* is not for family sd3; .* fits is sd15 or sdxl"),
        ("sd15", DDIMScheduler(prediction_type="x"), "prediction_type must be epsilon, v_prediction or sample"),
        ("sd15", DDIMScheduler(rescale_betas_zero_snr=True), "last timestep without any signal.*v_prediction model"),
    ],
)
def test_a_scheduler_that_means_another_kind_of_model_is_refused(family, scheduler, said):
    with pytest.raises(ModelError, match=said) as caught:
        plain_scheduler(scheduler, config(family, "x"))
    assert "\n" not in str(caught.value)


def test_a_last_timestep_without_signal_is_fine_for_v_prediction():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert plain_scheduler(scheduler, config("sd15", "x")).alphas_cumprod.min() == 0


def test_a_folder_of_one_variant_names_it(family, tmp_path):
    folder = make_tiny_pipeline(family, tmp_path)
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert "has only weights of fp16; set model.variant=fp16" in message(family, folder)
    load_pipeline(config(family, folder, variant="fp16"), "cpu")


def test_a_grid_that_ends_in_a_step_without_noise_is_refused_with_the_remedy(tmp_path):
    folder = make_tiny_pipeline("sdxl", tmp_path / "model")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"steps_offset": 1', '"steps_offset": 0'))
    with pytest.raises(ModelError, match='set "steps_offset": 1') as caught:
        build(config("sdxl", folder), SamplingConfig(), "cpu")
    assert "\n" not in str(caught.value)
    build(config("sdxl", folder), SamplingConfig(eta=0.0), "cpu")
    with pytest.raises(ModelError, match=r"sampling\.steps=1001 is more than the 1000 timesteps"):
        build(config("sdxl", folder), SamplingConfig(steps=1001), "cpu")


def test_another_vae_takes_the_place_of_the_models(family, tiny_folder, tmp_path):
    other = make_tiny_pipeline(family, tmp_path / "other", seed=5) / "vae"
    ours = load_pipeline(config(family, tiny_folder(family), vae=str(other)), "cpu").vae
    own = load_pipeline(config(family, tiny_folder(family)), "cpu").vae
    theirs = load_pipeline(config(family, tmp_path / "other"), "cpu").vae
    assert torch.equal(ours.decoder.conv_in.weight, theirs.decoder.conv_in.weight)
    assert not torch.equal(ours.decoder.conv_in.weight, own.decoder.conv_in.weight)


def test_a_large_base_is_named_while_it_loads(tiny_folder, monkeypatch, capsys):
    folder = tiny_folder("sd15")
    build(config("sd15", folder), SamplingConfig(), "cpu")
    assert "loads" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "LARGE", 1000)
    build(config("sd15", folder), SamplingConfig(), "cpu")
    assert f"loading the base model '{folder}'\n" in capsys.readouterr().err


def test_missing_folder_is_named(tmp_path):
    said = message("sd15", tmp_path / "nowhere")
    assert f"model.path='{tmp_path}/nowhere' is no folder here" in said
    assert "model.vae='a/b/c'" in message("sd15", tmp_path, vae="a/b/c")


def test_without_network_a_hub_name_says_what_to_download_and_where_to_put_it(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = message("sd15", "someone/no-such-model")
    assert "hf download someone/no-such-model --local-dir models/no-such-model" in said


PUBLISHED = [
    "model_index.json",
    "README.md",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_3/spiece.model",
    "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/model.onnx",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (
            {"family": "sd15"},
            "text_encoder/model text_encoder_3/model-00001-of-00002 unet/diffusion_pytorch_model "
            "vae/diffusion_pytorch_model",
        ),
        (
            {"family": "sd3", "t5": False, "variant": "fp16"},
            "text_encoder/model.fp16 unet/diffusion_pytorch_model.fp16 vae/diffusion_pytorch_model.fp16",
        ),
    ],
)
def test_what_to_download_is_one_variant_in_one_format_with_all_settings(settings, weights):
    options = shlex.split(files_of(ModelConfig(path="a/b", resolution=64, revision="main", **settings)))
    given: dict[str, list[str]] = {"--include": [], "--exclude": [], "--revision": []}
    for option, value in zip(options[::2], options[1::2], strict=True):
        given[option].append(value)
    chosen = list(
        huggingface_hub.utils.filter_repo_objects(
            PUBLISHED, allow_patterns=given["--include"], ignore_patterns=given["--exclude"]
        )
    )
    assert [name for name in chosen if "safetensors" in name and "index" not in name] == [
        f"{name}.safetensors" for name in weights.split()
    ]
    assert {"model_index.json", "unet/config.json", "tokenizer/merges.txt", "tokenizer_3/spiece.model"} <= set(chosen)
    assert not [name for name in chosen if name.endswith((".bin", ".onnx", ".md"))]
    assert given["--revision"] == ["main"]


def test_folder_of_the_other_family_names_the_right_one(family, tiny_folder):
    other = FAMILIES[FAMILIES.index(family) - 1]
    assert f"set model.family={other}" in message(family, tiny_folder(other))


def test_folder_that_is_no_pipeline_is_refused(family, tmp_path):
    assert "save_pretrained" in message(family, tmp_path)


def test_weights_that_could_run_code_are_refused(family, tmp_path):
    assert "safetensors" in message(family, make_tiny_pipeline(family, tmp_path, safe_serialization=False))


def test_variant_that_is_not_there_is_refused(family, tiny_folder):
    assert "fp16" in message(family, tiny_folder(family), variant="fp16")


def test_damaged_weights_are_refused(family, tmp_path):
    folder = make_tiny_pipeline(family, tmp_path)
    weights = folder / NETWORKS[family].component / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in message(family, folder)


def test_a_tiny_autoencoder_decodes_in_the_vaes_place_and_must_fit_the_latents(family, tiny_folder, tmp_path):
    denoiser = make_tiny_denoiser(family, tiny_folder(family))
    options = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "upsampling_scaling_factor": 2}
    for channels in (4, 8):
        AutoencoderTiny(**options, **blocks, latent_channels=channels).save_pretrained(tmp_path / str(channels))
    latents = torch.randn(3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    before = denoiser.decode(latents)
    denoiser.autoencoder.preview = load_tiny_vae(str(tmp_path / "4"), denoiser)
    with torch.no_grad():
        quick = denoiser.decode(latents)
        raw = denoiser.autoencoder.preview.decode(latents).sample
    assert quick.shape == before.shape
    torch.testing.assert_close(quick, (raw / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ModelError, match=r"scoring\.tiny_vae=.* decodes 8 channels, the model has 4"):
        load_tiny_vae(str(tmp_path / "8"), denoiser)
    with pytest.raises(ModelError, match=r"scoring\.tiny_vae='nowhere' is no folder"):
        load_tiny_vae("nowhere", denoiser)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_prompt_is_encoded_once_and_comes_back_the_same(family: str, tmp_path: Path, monkeypatch) -> None:
    folder = make_tiny_pipeline(family, tmp_path / "model")
    plain, keeping = (make_tiny_denoiser(family, folder, keep_prompts=keep).network for keep in (False, True))
    asked: list[list[str]] = []
    embed = keeping._embed
    monkeypatch.setattr(keeping, "_embed", lambda prompts: asked.append(prompts) or embed(prompts))
    keeping.encode(["a cat", "a dog"])
    asked.clear()
    found, expected = (network.encode(["a dog", "a hen", "a dog"]).tensors for network in (keeping, plain))
    assert asked == [["a hen"]]
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_weight_is_named_and_never_drawn_at_random(tmp_path, part):
    folder = make_tiny_pipeline("sdxl", tmp_path)
    [file] = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = sorted(state)[-1]
    save_file({key: weight for key, weight in state.items() if key != name}, file, {"format": "pt"})
    assert re.search(rf"its {part} lacks .*{name.rpartition('.')[0]}.*; get it again", message("sdxl", folder))


class TestSingleFile:
    @pytest.fixture
    def file(self, tiny_folder, tmp_path):
        save_single_file(load_plainly(tiny_folder("sd15")), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    def test_its_weights_are_those_of_the_folder(self, file, tiny_folder):
        folder = tiny_folder("sd15")
        loaded = load_pipeline(config("sd15", file, config=str(folder)), "cpu")
        expected = load_pipeline(config("sd15", folder), "cpu")
        for name in ("unet", "vae", "text_encoder"):
            found, original = (getattr(each, name).state_dict() for each in (loaded, expected))
            assert set(found) == set(original)
            assert all(torch.equal(found[key], original[key]) for key in original)
        assert dict(loaded.scheduler.config) == dict(expected.scheduler.config)

    def test_without_network_it_says_what_to_download(self, file, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        said = message("sd15", file)
        assert re.search(
            r"model\.config='.*': ?.*|run `hf download .*bring the folder here and name it in model\.config", said
        )
        assert "name it in model.config" in said

    def test_what_does_not_fit_is_refused_in_one_line(self, file, tiny_folder, tmp_path):
        assert "set model.family=sdxl" in message("sd15", file, config=str(tiny_folder("sdxl")))
        save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors")
        assert "lora.safetensors" in message("sd15", tmp_path / "lora.safetensors", config=str(tiny_folder("sd15")))
        (tmp_path / "damaged.safetensors").write_bytes(file.read_bytes()[:1000])
        assert "cannot be loaded" in message("sd15", tmp_path / "damaged.safetensors", config=str(tiny_folder("sd15")))
        assert "is no folder here" in message("sd15", tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=r"is for a path to a \.safetensors file"):
            config("sd15", "folder", config="other")

    def test_a_file_that_predicts_v_needs_settings_that_say_so(self, file, tiny_folder):
        save_single_file(load_plainly(tiny_folder("sd15")), file, v_pred=torch.zeros(1))
        assert "predicts v, but model.config" in message("sd15", file, config=str(tiny_folder("sd15")))
        load_pipeline(config("sd15", file, config=str(tiny_folder("sd15", "v_prediction"))), "cpu")
