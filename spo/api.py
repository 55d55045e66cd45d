"""SPO on a diffusers pipeline of your own, with a reward of your own, without a project folder.

spo.align(pipeline, reward, prompts, "my-lora")     # docs/api.md
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from spo.config import D3poConfig, GrpoConfig, ModelConfig, SamplingConfig, SpoConfig, StepGrpoConfig
from spo.core.types import LabelledPairs, Scorer
from spo.errors import ConfigError
from spo.methods.method import Inputs, build_method
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import PIPELINES, assemble
from spo.models.lora import add_lora
from spo.models.policy import save_policy
from spo.models.schedulers import plain_scheduler
from spo.preference.reward import Reward, RewardScorer
from spo.runtime.files import atomic_path, write_json
from spo.tracking import NullTracker
from spo.training import align as training


def wrap(
    pipeline: Any, *, resolution: int | tuple[int, int], sampling: SamplingConfig | None = None
) -> LatentDiffusion:
    """A loaded diffusers pipeline, on its device, as the model that methods train.

    Network, autoencoder and text encoders are shared with the pipeline, and are frozen. Its scheduler stays as it is.

    Args:
        pipeline: of Stable Diffusion v1.5, SDXL, SD3 or FLUX
        resolution: in pixels: the side of a square, or width and height
        sampling: the sampler in training
    """
    family = next((name for name, kind in PIPELINES.items() if type(pipeline) is kind), None)
    if family is None:
        known = ", ".join(kind.__name__ for kind in PIPELINES.values())
        raise ConfigError(f"the pipeline is a {type(pipeline).__name__}; it should be one of {known}")
    values = {"family": family, "path": pipeline.name_or_path or "the pipeline", "resolution": resolution}
    config = ModelConfig.model_validate(values)
    shared = copy.copy(pipeline)
    shared.scheduler = plain_scheduler(pipeline.scheduler, config)
    return assemble(shared, config, sampling or SamplingConfig())


def align(
    pipeline: Any,
    reward: Reward | Scorer,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    resolution: int | tuple[int, int],
    settings: SpoConfig | D3poConfig | GrpoConfig | StepGrpoConfig | None = None,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a LoRA on the pipeline by SPO, or by another method that samples; its measurements.

    The LoRA is in `folder`/lora, for `pipeline.load_lora_weights`; the pipeline keeps it attached. Checkpoints and the
    history's tables are in `folder`, too, which must not exist.

    Args:
        reward: a function of images (n, 3, height, width) in [0, 1], n prompts and the timestep that returns n scores,
            higher is better; or a preference model's scorer
        settings: of the method: a SpoConfig, D3poConfig, GrpoConfig or StepGrpoConfig; default: SpoConfig()
        sampling, resolution: as in `wrap`
    """
    if Path(folder).exists():
        raise ConfigError(f"{folder} exists; name a folder that does not")
    if not prompts:
        raise ConfigError("prompts is empty; name at least one")
    settings, model = settings or SpoConfig(), wrap(pipeline, resolution=resolution, sampling=sampling)
    scorer = cast(Scorer, reward) if hasattr(reward, "encode") else RewardScorer(cast(Reward, reward))
    inputs = Inputs(policy=model, prompts=prompts, load_scorer=lambda _: scorer, load_pairs=_no_pairs)
    method = build_method(settings, inputs, seed=seed)
    add_lora(model.network.module, settings.lora, seed=seed)
    with atomic_path(folder) as made:
        measured = training.align(method, model, settings, made, NullTracker(), seed=seed)
        save_policy(model.network, made / "lora")
        write_json(made / "metrics.json", measured)
    return measured


def _no_pairs() -> LabelledPairs:
    names = "SpoConfig, D3poConfig, GrpoConfig or StepGrpoConfig"
    raise ConfigError(f"the method learns from labelled pairs; give settings of {names}")
