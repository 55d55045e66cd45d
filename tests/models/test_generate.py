"""Images by any sampler: each from its own seed, whatever is made beside it."""

from itertools import product
from typing import Any

import pytest
import torch

from spo.config import FLOW, SamplerConfig
from spo.core.gaussian import sample
from spo.core.schedule import RectifiedFlow
from spo.core.step import gaussian_step
from spo.errors import ConfigError, ModelError
from spo.models.generate import generate
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.schedulers import USABLE, build_scheduler
from tests.models.tiny import FAMILIES, FLOWS, RESOLUTION, T5_TOKENS, make_tiny_denoiser, make_tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' own
PROMPTS, SEEDS = ["a red house", "fog", "a dog"], [3, 4, 5]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusion]:
    folders = {family: make_tiny_pipeline(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
    return {family: make_tiny_denoiser(family, folder) for family, folder in folders.items()}


@pytest.fixture
def model(models: dict[str, LatentDiffusion]) -> LatentDiffusion:
    return models["sd15"]


SAMPLERS = [
    *(SamplerConfig(scheduler=name, steps=4) for name in USABLE),
    SamplerConfig(steps=4, eta=1.0),
    SamplerConfig(scheduler="DPMSolverMultistepScheduler", steps=4, options={"algorithm_type": "sde-dpmsolver++"}),
]
FLOW_SAMPLERS = [SamplerConfig(scheduler=FLOW, steps=4, eta=eta) for eta in (0.0, 1.0)]


@pytest.mark.parametrize(
    ("family", "sampler"),
    [*product(["sd15"], SAMPLERS), *product(["sdxl"], SAMPLERS[-2:]), *product(FLOWS, FLOW_SAMPLERS)],
    ids=lambda value: value if isinstance(value, str) else value.description,
)
def test_an_image_depends_on_its_prompt_and_seed_alone(
    models: dict[str, LatentDiffusion], family: str, sampler: SamplerConfig
) -> None:
    model = models[family]
    together = generate(model, PROMPTS, SEEDS, sampler=sampler, batch_size=3)
    torch.manual_seed(1)  # another state of the global generator, which nothing may draw from
    alone = generate(model, PROMPTS[1:], SEEDS[1:], sampler=sampler, batch_size=1)
    torch.testing.assert_close(alone, together[1:], atol=1e-4, rtol=1e-3)
    assert together.isfinite().all()


def test_pixels_that_are_not_finite_are_named(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = model.network.module.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, float("nan")))
    with pytest.raises(ModelError, match=r"not finite \(4 steps, guidance 5; first prompt 'fog'\); its weights"):
        generate(model, PROMPTS[1:], SEEDS[1:], sampler=SamplerConfig(steps=4), batch_size=2)


def test_a_sampler_leaves_the_pipelines_own_scheduler(model: LatentDiffusion) -> None:
    own = model.network.pipeline.scheduler
    generate(model, PROMPTS[:1], SEEDS[:1], sampler=SamplerConfig(scheduler="EulerDiscreteScheduler"), batch_size=1)
    assert model.network.pipeline.scheduler is own


@pytest.mark.parametrize("family", FLOWS)
def test_without_noise_a_flows_images_are_plain_diffusers_own(models: dict[str, LatentDiffusion], family: str) -> None:
    pipeline = models[family].network.pipeline
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"height": RESOLUTION, "width": RESOLUTION, "output_type": "pt", "max_sequence_length": T5_TOKENS}
    theirs = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=5.0, generator=generators, **options).images
    ours = [generate(models[family], PROMPTS, SEEDS, sampler=each, batch_size=3) for each in FLOW_SAMPLERS]
    torch.testing.assert_close(ours[0], theirs.clamp(0, 1))
    assert (ours[0] - ours[1]).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noise_of_a_flows_scheduler_is_that_of_our_step(eta: float) -> None:
    scheduler = build_scheduler(SamplerConfig(scheduler=FLOW, steps=5, eta=eta), {"shift": 3.0})
    schedule, generator = RectifiedFlow(), torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        x_t, output = torch.randn(2, 2, 4, 8, 8, generator=generator)
        scheduler.generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
        now, then = t.expand(2), 1000 * scheduler.sigmas[i + 1].expand(2)
        expected = gaussian_step(output, x_t, now, then, schedule=schedule, eta=eta, prediction_type="flow")
        (ours,) = scheduler.step(output, t, x_t)
        torch.testing.assert_close(ours, sample(expected, noise), atol=1e-5, rtol=1e-4)


def test_settings_change_the_image(model: LatentDiffusion) -> None:
    plain = SamplerConfig(scheduler="DPMSolverMultistepScheduler", steps=4)
    others = [
        plain.model_copy(update=change)
        for change in ({"steps": 5}, {"guidance_scale": 7.5}, {"options": {"use_karras_sigmas": True}})
    ]
    images = [generate(model, PROMPTS[:1], SEEDS[:1], sampler=each, batch_size=1) for each in (plain, *others)]
    assert all((images[0] - image).abs().max() > 1e-4 for image in images[1:])


def test_a_scheduler_keeps_the_noise_schedule_of_its_base(model: LatentDiffusion) -> None:
    base = model.network.pipeline.scheduler
    found = build_scheduler(SamplerConfig(scheduler="UniPCMultistepScheduler"), base.config)
    torch.testing.assert_close(found.alphas_cumprod, base.alphas_cumprod)
    assert found.config.prediction_type == base.config.prediction_type


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "Nothing"}, r"scheduler='Nothing' is no scheduler that .* use one of \['DDIMScheduler', "),
        ({"scheduler": "SchedulerMixin"}, "is no scheduler that the pipeline can use"),
        ({"scheduler": "FlowMatchHeunDiscreteScheduler"}, "is no scheduler that the pipeline can use"),
        ({"scheduler": FLOW, "options": {"karras": True}}, r"options=\['karras'\] are unknown to FlowMatchEuler"),
        ({"options": {"karras": True}}, r"options=\['karras'\] are unknown to DDIMScheduler; use some of \['num_train"),
        ({"scheduler": "EulerDiscreteScheduler", "eta": 0.0}, "eta=0, but EulerDiscreteScheduler has no eta; leave"),
        ({"steps": 5000}, "5000 steps, guidance 5: DDIMScheduler refuses: .* change the settings"),
        (
            {"scheduler": "DPMSolverMultistepScheduler", "options": {"algorithm_type": "none"}},
            "DPMSolverMultistepScheduler refuses: none is not implemented",
        ),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_scheduler(SamplerConfig(**settings))
    assert "\n" not in str(caught.value)
