"""The one door by which a judge comes near a training: it watches from outside (see spo/training/watch.py).

Nothing that trains can import a judge. This module alone does; it hands the loop functions whose values are logged
and may end the run, but never become a label or a gradient.
"""

from pathlib import Path

import torch
from torch import Tensor

from spo.config import Config
from spo.errors import DataError
from spo.evaluation.generate import generate, image_seed
from spo.evaluation.metrics import build_metrics, score
from spo.models.base import LatentDiffusion
from spo.stages.preference_scorer import load_scorer
from spo.training.watch import Watch

BATCH = 32  # pictures painted at a time, or as many as `evaluate` takes where that is less


def build_watch(config: Config, name: str, policy: LatentDiffusion, *, root: Path) -> Watch | None:
    """The watch of the method called `name`, which paints the first validation prompts, eta 0.

    None where it has none, or its metric's weights are absent: that is a ModelError only if the watch may end the run.
    """
    settings = config.align[name].watch
    if settings is None:
        return None
    path = root / config.folder("prepare") / "prompts" / "validation.txt"
    if not path.is_file():
        raise DataError(f"{path} is missing; run `python -m spo prepare`")
    prompts = path.read_text(encoding="utf-8").splitlines()[: settings.num_prompts]
    needed = (settings.score,) if settings.stop_after_worse else ()
    metrics = build_metrics([settings.metric], policy.device, needed=needed)
    if not metrics:
        print(f"align {name} goes on unwatched", flush=True)
        return None
    preference = load_scorer(config, root, policy.device)
    text = preference.encode(prompts)

    def paint() -> Tensor:
        # full fine-tuning trains a UNet in float32 between parts of half precision
        with torch.autocast(policy.device.type, policy.dtype, enabled=policy.dtype != torch.float32):
            return generate(
                policy,
                prompts,
                [image_seed(settings.seed, prompt, 0) for prompt in prompts],
                steps=config.sampling.steps,
                guidance_scale=config.sampling.guidance_scale,
                eta=0.0,
                batch_size=min(BATCH, config.evaluate.batch_size),
                label="watch",
            )

    def favour(pictures: Tensor) -> Tensor:
        return preference(pictures, text, torch.zeros((), dtype=torch.long)).cpu()

    def judgement(pictures: Tensor) -> Tensor:
        return score(metrics, pictures, prompts)[settings.score]

    return Watch(settings, paint, favour, judgement)
