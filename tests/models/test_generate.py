"""Images by any sampler: each from its own seed, whatever is made beside it."""

from typing import Any

import pytest
import torch

from spo.config import SamplerConfig
from spo.errors import ConfigError
from spo.models.generate import generate
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.schedulers import USABLE, build_scheduler
from tests.models.tiny import FAMILIES, make_tiny_denoiser, make_tiny_pipeline

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


@pytest.mark.parametrize(
    ("family", "sampler"),
    [*(("sd15", sampler) for sampler in SAMPLERS), *(("sdxl", sampler) for sampler in SAMPLERS[-2:])],
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


def test_a_sampler_leaves_the_pipelines_own_scheduler(model: LatentDiffusion) -> None:
    own = model.network.pipeline.scheduler
    generate(model, PROMPTS[:1], SEEDS[:1], sampler=SamplerConfig(scheduler="EulerDiscreteScheduler"), batch_size=1)
    assert model.network.pipeline.scheduler is own


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
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "is no scheduler that the pipeline can use"),
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
