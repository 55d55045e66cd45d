"""The contract of every model family, on random tiny weights."""

import os
import shutil
import sysconfig
from functools import partialmethod
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from peft.tuners.lora import LoraLayer

from spo.config import LoraConfig, SamplingConfig
from spo.core.types import Conditioning
from spo.errors import ConfigError, ModelError
from spo.models.load import order_for_convolutions
from spo.models.lora import add_lora
from tests.models.sampled import ours, theirs
from tests.models.tiny import (
    DIFFUSION,
    FLOWS,
    RESOLUTION,
    draw_latents,
    make_tiny_denoiser,
    make_tiny_pipeline,
    shake,
    with_sampling,
)
from tests.training.steps import assert_same_up_to_rounding

PROMPTS = ["a red house", "two cats on a mat", "fog"]
T = torch.tensor([801, 401, 1])
HEADERS = Path(sysconfig.get_path("include"), "Python.h")
CAN_COMPILE = HEADERS.is_file() and shutil.which(os.environ.get("CXX", "g++")) is not None


def halves(denoiser) -> int:
    """How often a sample goes through the network under guidance."""
    return 1 if denoiser.network.is_distilled else 2


@pytest.mark.parametrize("family", [*DIFFUSION, "sd3"])
def test_both_halves_of_the_guidance_in_one_call_equal_two_calls(denoiser):
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
    plain = with_sampling(denoiser, guidance_scale=1.0)
    marked = {name: tensor for name, tensor in cond.tensors.items() if name.startswith("negative_")}
    negative = Conditioning({name.removeprefix("negative_"): tensor for name, tensor in marked.items()})
    towards, away = plain.predict(x_t, T, cond), plain.predict(x_t, T, negative)
    assert (towards - away).abs().max() > 1e-4
    torch.testing.assert_close(denoiser.predict(x_t, T, cond), away + 5 * (towards - away), atol=2e-5, rtol=1e-5)


def test_latents_of_another_size_are_predicted_as_by_a_model_of_that_resolution(denoiser, family, tiny_folder):
    other = make_tiny_denoiser(family, tiny_folder(family), resolution=(RESOLUTION, RESOLUTION // 2))
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(other, 3)
    assert x_t.shape[1:] != denoiser.latent_shape
    assert torch.equal(denoiser.predict(x_t, T, cond), other.predict(x_t, T, cond))


def test_forwards_count_every_sample_and_half(denoiser):
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
    denoiser.predict(x_t, T, cond)
    assert denoiser.network.forwards == 3 * halves(denoiser)
    with_sampling(denoiser, guidance_scale=1.0).predict(x_t, T, cond)
    assert denoiser.network.forwards == 3 * halves(denoiser) + 3


def test_distilled_guidance_is_an_input_of_the_network(tiny_folder):
    flux = make_tiny_denoiser("flux", tiny_folder("flux"))
    cond, x_t = flux.encode(PROMPTS), draw_latents(flux, 3)
    assert not any(name.startswith("negative_") for name in cond.tensors)
    weak = with_sampling(flux, guidance_scale=1.0).predict(x_t, T, cond)
    assert (flux.predict(x_t, T, cond) - weak).abs().max() > 1e-4


def test_a_model_like_schnell_has_no_guidance(tmp_path):
    folder = make_tiny_pipeline("flux", tmp_path, guidance_embeds=False)
    schnell = make_tiny_denoiser("flux", folder, sampling=SamplingConfig(steps=2, eta=0.0))
    found = ours(schnell)
    torch.testing.assert_close(found, theirs(schnell.network.pipeline), atol=1e-3, rtol=1e-4)
    assert torch.equal(ours(with_sampling(schnell, guidance_scale=1.0)), found)


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize("family", FLOWS)
def test_the_grid_is_the_one_that_the_pipeline_sets(denoiser, is_dynamic):
    pipeline = denoiser.network.pipeline
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=is_dynamic)
    theirs(pipeline, steps=3)
    assert torch.equal(denoiser.network.sampler(SamplingConfig(steps=3)).timesteps, pipeline.scheduler.timesteps)


def test_without_gradients_the_network_goes_by_slices_that_change_nothing(denoiser):
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
    whole = denoiser.predict(x_t, T, cond).detach()
    sizes = []
    denoiser.network.module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    denoiser.network.batch_size = 2 * halves(denoiser)
    with torch.no_grad():
        sliced = denoiser.predict(x_t, T, cond)
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=1e-5)
    denoiser.predict(x_t, T, cond)
    assert sizes == [size * halves(denoiser) for size in (2, 1, 3)]


def test_rows_follow_the_prompts_whatever_their_company(denoiser):
    together = denoiser.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = denoiser.encode([prompt])
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(together[i : i + 1].tensors[name], tensor, atol=1e-5, rtol=1e-5)


def test_text_encoders_wait_on_the_cpu_while_they_encode_nothing(family, tiny_folder, monkeypatch):
    network = make_tiny_denoiser(family, tiny_folder(family), offload_text_encoders=True).network
    events = []
    for encoder in network.offloaded:
        monkeypatch.setattr(encoder, "to", events.append)
        encoder.register_forward_pre_hook(lambda *_: events.append("encodes"))
    network.encode(PROMPTS)
    num_encoders, num_calls = (1 if family == "sd15" else 2), (1 if family == "flux" else 2)  # with negative prompts
    assert events == num_encoders * [network.device] + num_encoders * num_calls * ["encodes"] + num_encoders * ["cpu"]


def test_prediction_is_differentiable_in_float32_by_the_lora_alone(denoiser):
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
    output = denoiser.predict(draw_latents(denoiser, 3), T, denoiser.encode(PROMPTS))
    output.square().mean().backward()
    assert output.dtype == torch.float32
    names = [name for name, parameter in denoiser.network.module.named_parameters() if parameter.grad is not None]
    assert names
    assert all("lora" in name for name in names)
    assert len(names) == len(denoiser.network.parameters())


@pytest.mark.parametrize("family", DIFFUSION)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_transition_is_diffusers_ddim_step(family, tiny_folder, prediction_type, eta):
    sampling = SamplingConfig(steps=5, eta=eta)
    denoiser = make_tiny_denoiser(family, tiny_folder(family, prediction_type), sampling=sampling)
    scheduler = DDIMScheduler.from_config(denoiser.network.pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    assert denoiser.timesteps.tolist() == scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    output, x_t = draw_latents(denoiser, 2, seed=1), draw_latents(denoiser, 2)
    for t in (801, 401, 1):
        ours = denoiser.transition(output, x_t, torch.full((2,), t), torch.full((2,), max(t - 200, 0)))
        step = scheduler.step(output, t, x_t, eta=eta, variance_noise=torch.zeros_like(x_t))
        torch.testing.assert_close(ours.mean, step.prev_sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.x_0, step.pred_original_sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(
    ("family", "prediction_type"),
    [*product(DIFFUSION, ("epsilon", "v_prediction")), *product(FLOWS, ("flow",))],
)
def test_sampling_with_eta_0_is_the_pipelines_own_call(family, tiny_folder, prediction_type, guidance_scale):
    sampling = SamplingConfig(steps=4, eta=0.0, guidance_scale=guidance_scale)
    denoiser = make_tiny_denoiser(family, tiny_folder(family, prediction_type), sampling=sampling)
    expected = theirs(denoiser.network.pipeline, steps=4, guidance_scale=guidance_scale)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(denoiser), expected, atol=1e-3, rtol=1e-4)


def test_images_need_not_be_square(family, tiny_folder):
    sampling = SamplingConfig(steps=2, eta=0.0)
    denoiser = make_tiny_denoiser(family, tiny_folder(family), sampling=sampling, resolution=(8, 16))
    assert denoiser.latent_shape == (4, 8, 4)
    expected = theirs(denoiser.network.pipeline, height=16, width=8)
    torch.testing.assert_close(ours(denoiser), expected, atol=1e-3, rtol=1e-4)
    images = denoiser.decode(expected)
    assert images.shape == (2, 3, 16, 8)
    assert denoiser.autoencoder.encode(images).shape == expected.shape


def test_predicted_x_0_undoes_added_noise_if_the_output_is_the_target(denoiser):
    x_0, noise = draw_latents(denoiser, 3), draw_latents(denoiser, 3, seed=1)
    x_t, target = denoiser.sampler.add_noise(x_0, noise, T), denoiser.sampler.target(x_0, noise, T)
    torch.testing.assert_close(denoiser.sampler.predict_x_0(target, x_t, T), x_0, atol=1e-4, rtol=1e-4)


def test_decode_is_the_pipelines_picture_whatever_the_slices(denoiser):
    latents = draw_latents(denoiser, 3)
    images = denoiser.decode(latents)
    assert images.shape == (3, 3, RESOLUTION, RESOLUTION)
    assert images.min() >= 0
    assert images.max() <= 1
    config = denoiser.autoencoder.vae.config
    raw = denoiser.autoencoder.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
    theirs = denoiser.network.pipeline.image_processor.postprocess(raw, output_type="pt")
    torch.testing.assert_close(images, theirs)
    denoiser.autoencoder.batch_size = 2
    torch.testing.assert_close(denoiser.decode(latents), images)


def test_encode_images_gives_what_decode_takes(denoiser):
    images = torch.rand(3, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    mean = denoiser.autoencoder.encode(images)
    assert mean.shape == (3, *denoiser.latent_shape)
    posterior, config = denoiser.autoencoder.vae.encode(2 * images - 1).latent_dist, denoiser.autoencoder.vae.config
    torch.testing.assert_close(mean, (posterior.mean - (config.shift_factor or 0)) * config.scaling_factor)
    assert denoiser.decode(mean).shape == images.shape


@pytest.mark.parametrize("family", ["sd15"])
def test_shift_of_a_vae_is_undone(denoiser):
    images = torch.rand(1, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    plain_latents, plain_images = (
        denoiser.autoencoder.encode(images),
        denoiser.decode(torch.zeros(1, *denoiser.latent_shape)),
    )
    denoiser.autoencoder.vae.register_to_config(shift_factor=0.5)
    shifted = denoiser.autoencoder.encode(images)
    torch.testing.assert_close(shifted, plain_latents - 0.5 * 0.3)
    torch.testing.assert_close(denoiser.decode(torch.full((1, *denoiser.latent_shape), -0.5 * 0.3)), plain_images)


def test_a_new_lora_changes_nothing_and_its_seed_decides_it(denoiser, family, tiny_folder):
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
    before = denoiser.predict(x_t, T, cond)
    state = torch.get_rng_state()
    add_lora(denoiser.network.module, LoraConfig(rank=2), seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(denoiser.predict(x_t, T, cond), before)
    other, same = make_tiny_denoiser(family, tiny_folder(family)), make_tiny_denoiser(family, tiny_folder(family))
    add_lora(other.network.module, LoraConfig(rank=2), seed=8)
    add_lora(same.network.module, LoraConfig(rank=2), seed=7)
    ours, differs, equals = (model.network.parameters() for model in (denoiser, other, same))
    assert all(torch.equal(a, b) for a, b in zip(ours, equals, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(ours, differs, strict=True))


def test_targets_that_the_unet_lacks_are_refused(denoiser):
    with pytest.raises(ModelError, match=r"lora\.targets=\['to_nowhere'\]"):
        add_lora(denoiser.network.module, LoraConfig(targets=("to_nowhere",)), seed=0)


@pytest.fixture(params=["lora", "full"])
def trained(request, denoiser):
    """A denoiser whose policy has left its base, with what the base says."""
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
    base = denoiser.predict(x_t, T, cond)
    if request.param == "lora":
        add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
    else:
        denoiser.network.unfreeze()
    shake(denoiser)
    return denoiser, cond, x_t, base


def test_reference_is_exactly_the_base_and_the_policy_comes_back(trained):
    denoiser, cond, x_t, base = trained
    policy = denoiser.predict(x_t, T, cond)
    assert (policy - base).abs().max() > 1e-3
    with denoiser.reference():
        assert torch.equal(denoiser.predict(x_t, T, cond), base)
    assert torch.equal(denoiser.predict(x_t, T, cond), policy)


def test_the_policy_comes_back_after_an_exception(trained):
    denoiser, cond, x_t, _ = trained
    policy, trainable = denoiser.predict(x_t, T, cond), len(denoiser.network.parameters())
    with pytest.raises(KeyboardInterrupt), denoiser.reference():
        raise KeyboardInterrupt
    assert torch.equal(denoiser.predict(x_t, T, cond), policy)
    assert len(denoiser.network.parameters()) == trainable


def test_gradients_survive_a_reference_pass_between_forward_and_backward(trained):
    denoiser, cond, x_t, _ = trained

    def gradients(between: bool) -> list[torch.Tensor]:
        loss = denoiser.predict(x_t, T, cond).square().mean()
        if between:
            with torch.no_grad(), denoiser.reference():
                denoiser.predict(x_t, T, cond)
        return list(torch.autograd.grad(loss, denoiser.network.parameters()))

    torch.testing.assert_close(gradients(True), gradients(False))


def test_without_anything_trained_the_reference_is_the_model(denoiser):
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
    with denoiser.reference():
        inside = denoiser.predict(x_t, T, cond)
    assert torch.equal(denoiser.predict(x_t, T, cond), inside)
    assert denoiser.network.parameters() == []


def test_gradient_checkpointing_changes_no_gradient(family, tiny_folder):
    gradients = []
    for checkpointing in (False, True):
        denoiser = make_tiny_denoiser(family, tiny_folder(family), gradient_checkpointing=checkpointing)
        add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
        shake(denoiser)
        loss = denoiser.predict(draw_latents(denoiser, 3), T, denoiser.encode(PROMPTS)).square().mean()
        with torch.no_grad(), denoiser.reference():
            denoiser.predict(draw_latents(denoiser, 3), T, denoiser.encode(PROMPTS))
        gradients.append(torch.autograd.grad(loss, denoiser.network.parameters()))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("device", "compiled", "last"), [("cpu", False, True), ("meta", False, False), ("meta", True, True)]
)
def test_a_vae_off_the_cpu_is_in_channels_last_order_only_if_it_is_compiled(tiny_folder, device, compiled, last):
    pipeline = make_tiny_denoiser("sd15", tiny_folder("sd15")).network.pipeline
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.contiguous_format).to(device)
    order_for_convolutions(pipeline, compiled=compiled)
    found = [
        part.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        for part in (pipeline.unet, pipeline.vae.decoder)
    ]
    assert found == [True, last]


LONG = pytest.mark.skipif(not os.environ.get("SPO_SOAK"), reason="compiles for a minute; `make soak` runs it")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what torch does to compile
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler and Python's headers")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=LONG)])  # traced alike, then compiled
def test_compiled_blocks_give_the_same_predictions_and_gradients(tiny_folder, monkeypatch, backend):
    compile_blocks = ModelMixin.compile_repeated_blocks
    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", partialmethod(compile_blocks, backend=backend))
    found = []
    for compiled in (False, True):
        denoiser = make_tiny_denoiser("sd15", tiny_folder("sd15"), compile=compiled)
        add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
        shake(denoiser)
        cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
        with torch.no_grad(), denoiser.merged():
            sampled = denoiser.predict(x_t, T, cond)
        policy = denoiser.predict(x_t, T, cond)
        with torch.no_grad(), denoiser.reference():
            reference = denoiser.predict(x_t, T, cond)
        gradients = torch.autograd.grad(policy.square().mean(), denoiser.network.parameters())
        with torch.no_grad():
            image = denoiser.decode(x_t)
        found.append((sampled, policy, reference, image, *gradients))
        modules = [*denoiser.network.module.modules(), *denoiser.autoencoder.vae.modules()]
        blocks = [module for module in modules if type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")]
        assert blocks and all((block._compiled_call_impl is not None) == compiled for block in blocks)
    for plain, compiled in zip(*found, strict=True):
        assert_same_up_to_rounding(plain, compiled)


def test_compiling_without_a_compiler_says_what_to_install(tiny_folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler"):
        make_tiny_denoiser("sd15", tiny_folder("sd15"), compile=True)


def test_bfloat16_stays_near_float32_with_trainable_weights_in_float32(family, tiny_folder):
    outputs = []
    for dtype in ("float32", "bfloat16"):
        denoiser = make_tiny_denoiser(family, tiny_folder(family), dtype=dtype)
        add_lora(denoiser.network.module, LoraConfig(rank=2), seed=0)
        shake(denoiser, scale=0.1)
        cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
        output = with_sampling(denoiser, guidance_scale=1.0).predict(x_t, T, cond)
        output.square().mean().backward()
        images = denoiser.decode(x_t)
        assert output.dtype == images.dtype == denoiser.autoencoder.encode(images).dtype == torch.float32
        assert (
            {p.dtype for p in denoiser.network.parameters()}
            == {p.grad.dtype for p in denoiser.network.parameters()}
            == {torch.float32}
        )
        outputs.append(output.detach())
    assert (outputs[0] - outputs[1]).norm() < 0.05 * outputs[0].norm()


def test_in_half_precision_a_lora_computes_in_the_dtype_of_its_layer(family, tiny_folder):
    denoiser = make_tiny_denoiser(family, tiny_folder(family), dtype="bfloat16")
    targets = ["to_q", "to_out.0", *(["conv1"] if family in DIFFUSION else [])]
    add_lora(denoiser.network.module, LoraConfig(rank=2, targets=targets), seed=0)
    shake(denoiser)
    seen = []
    for module in denoiser.network.module.modules():
        if isinstance(module, LoraLayer):
            for part in (*module.lora_A.values(), *module.lora_B.values()):
                part.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    loss = denoiser.predict(draw_latents(denoiser, 3), T, denoiser.encode(PROMPTS)).square().mean()
    gradients = torch.autograd.grad(loss, denoiser.network.parameters())
    assert set(seen) == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of float32 under autocast
def test_full_fine_tuning_in_bfloat16_trains_float32_weights_and_starts_at_the_reference(family, tiny_folder):
    denoiser = make_tiny_denoiser(family, tiny_folder(family), dtype="bfloat16")
    cond, x_t = denoiser.encode(PROMPTS), draw_latents(denoiser, 3)
    denoiser.network.unfreeze()
    with denoiser.reference():
        reference = denoiser.predict(x_t, T, cond)
    torch.testing.assert_close(denoiser.predict(x_t, T, cond), reference, atol=0.05, rtol=0.05)
    assert {p.dtype for p in denoiser.network.parameters()} == {torch.float32}


def test_wrong_sizes_are_refused(denoiser):
    with pytest.raises(ValueError, match="3 latents, 3 timesteps and 1 conditions"):
        denoiser.predict(draw_latents(denoiser, 3), T, denoiser.encode(["fog"]))
    with pytest.raises(ValueError, match="at least one prompt"):
        denoiser.encode([])
