"""Align the diffusion model by one method of the profile: a LoRA, saved several times along the way."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.config import Config, D3poConfig, DiffusionDpoConfig, SamplerConfig, ScoringConfig, SpoConfig
from spo.core.types import Scorer
from spo.errors import DataError
from spo.methods.d3po import D3po
from spo.methods.diffusion_dpo import DiffusionDpo
from spo.methods.method import Method
from spo.methods.spo import Spo
from spo.metrics.metric import build_metrics, score
from spo.models.base import LatentDiffusion
from spo.models.generate import generate, image_seed
from spo.models.load import build, load_tiny_vae
from spo.models.lora import add_lora
from spo.runtime import distributed
from spo.runtime.checkpoint import StateStore, fingerprints
from spo.runtime.device import best_device
from spo.runtime.files import atomic_path, write_json
from spo.tracking import Tracker
from spo.training.align import align
from spo.training.history import Cost
from spo.training.pairs import fingerprint_of_pairs, load_pairs
from spo.training.preference_scorer import load_scorer
from spo.training.watch import Watch

BATCH = 32  # pictures painted at a time, or as many as `evaluate` takes where that is less


def run(config: Config, name: str, seed: int, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write checkpoints/, metrics.json and the history's tables to runs/<profile>/align/<name>/seed-<seed>."""
    settings = config.align[name]
    store = state_store(config, name, seed, root)
    policy = build_policy(config, name)
    if settings.full_fine_tuning:
        policy.unfreeze()
    else:
        add_lora(policy.unet, settings.lora, seed=seed)
    start = time.perf_counter()
    method = build_method(config, name, policy, seed=seed, root=root)
    cost = Cost(seconds=time.perf_counter() - start)
    watch = build_watch(config, name, policy, root=root)
    grows = store.folder / "output"  # there, since DVC removes the outputs of a stage that it runs again
    with distributed.written_by_main(nullcontext(grows)) as made:
        metrics = align(
            method,
            policy,
            settings,
            made,
            tracker,
            seed=seed,
            cost=cost,
            watch=watch,
            safety=config.safety,
            store=store,
        )
        with distributed.written_by_main(atomic_path(root / config.aligned(name, seed))) as folder:
            shutil.copytree(made, folder)
            write_json(folder / "metrics.json", metrics)
    if distributed.is_main():
        store.clear()
        shutil.rmtree(grows)


def state_store(config: Config, name: str, seed: int, root: Path) -> StateStore:
    """Where the states of the run are, and what they depend on."""
    settings = config.model_dump(mode="json", include={"model", "sampling"})
    settings |= {"align": {name: config.align[name].model_dump(mode="json")}, "training_seed": seed}
    prepared = root / config.folder("prepare")
    inputs: dict[str, str | Path | None] = {"model": config.model.path, "vae": config.model.vae}
    if isinstance(config.align[name], DiffusionDpoConfig):
        settings |= {"pairs": fingerprint_of_pairs(prepared / "preferences" / "train.parquet")}
    else:
        model = root / config.folder("train_preference") / "model"
        inputs |= {"prompts": prepared / "prompts" / "train.txt", "preference_model": model}
    settings |= {"inputs": fingerprints(inputs)}
    return StateStore(root / config.state_folder("align", name, f"seed-{seed}"), settings)


def build_policy(config: Config, name: str) -> LatentDiffusion:
    """The base behind the method's sampler: Diffusion-DPO trains without guidance."""
    sampling = config.sampling
    if isinstance(config.align[name], DiffusionDpoConfig):
        sampling = sampling.model_copy(update={"guidance_scale": 1.0})
    return build(config.model, sampling, best_device())


def build_method(config: Config, name: str, policy: LatentDiffusion, *, seed: int, root: Path) -> Method[Any]:
    """The method called `name` in the profile, with the data that it learns from."""
    prepared = root / config.folder("prepare")
    prompts = training_prompts(prepared / "prompts" / "train.txt")
    match config.align[name]:
        case SpoConfig() as settings:
            return Spo(settings, policy, build_judge(config, settings.scoring, policy, root), prompts, seed=seed)
        case D3poConfig() as settings:
            return D3po(settings, policy, build_judge(config, settings.scoring, policy, root), prompts, seed=seed)
        case DiffusionDpoConfig() as settings:
            file, cache = prepared / "preferences" / "train.parquet", root / config.latents_folder
            pairs = load_pairs(file, policy, config, cache=cache)
            return DiffusionDpo(settings, policy, pairs.latents, pairs.label, pairs.captions, seed=seed)


def build_judge(config: Config, scoring: ScoringConfig, policy: LatentDiffusion, root: Path) -> Scorer:
    """The preference model that judges candidates; the policy decodes them as `scoring` says."""
    if scoring.tiny_vae is not None:
        policy.preview = load_tiny_vae(scoring.tiny_vae, policy)
    return load_scorer(config, root, policy.device, getattr(torch, scoring.dtype))


def training_prompts(path: Path) -> list[str]:
    """The prepared prompts, one a line; DataError where they are missing."""
    if not path.is_file():
        raise DataError(f"{path} is missing; run `python -m spo prepare`")
    return path.read_text(encoding="utf-8").splitlines()


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
    sampler = SamplerConfig(steps=config.sampling.steps, guidance_scale=config.sampling.guidance_scale, eta=0.0)

    def paint() -> Tensor:
        # full fine-tuning trains a UNet in float32 between parts of half precision
        with torch.autocast(policy.device.type, policy.dtype, enabled=policy.dtype != torch.float32):
            return generate(
                policy,
                prompts,
                [image_seed(settings.seed, prompt, 0) for prompt in prompts],
                sampler=sampler,
                batch_size=min(BATCH, config.evaluate.batch_size),
                label="watch",
            )

    def favour(pictures: Tensor) -> Tensor:
        return preference(pictures, text, torch.zeros((), dtype=torch.long)).cpu()

    def judgement(pictures: Tensor) -> Tensor:
        return score(metrics, pictures, prompts)[settings.score]

    return Watch(settings, paint, favour, judgement)
