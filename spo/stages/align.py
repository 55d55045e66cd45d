"""Align the diffusion model by one method of the profile; writes checkpoints of its LoRA during the training."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.config import Config, SamplerConfig, ScoringConfig
from spo.core.types import LabelledPairs, Scorer
from spo.methods.method import Inputs, build_method
from spo.metrics.metric import build_metrics, score
from spo.models.generate import generate, image_seed
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.load import build, load_tiny_vae
from spo.models.lora import add_lora
from spo.preference.by_time import ByTime
from spo.runtime import distributed
from spo.runtime.checkpoint import StateStore
from spo.runtime.device import best_device
from spo.runtime.files import atomic_path, write_json
from spo.runtime.hashing import fingerprints
from spo.tracking import Tracker
from spo.training.align import align
from spo.training.pairs import fingerprint_of_pairs, load_pairs
from spo.training.preference_scorer import LoadedPreference, load_scorer
from spo.training.watch import Watch
from spo.workspace import Workspace

BATCH = 32  # the watch's images at a time, at most


def run(config: Config, name: str, seed: int, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write checkpoints/, metrics.json and the history's tables to runs/<profile>/align/<name>/seed-<seed>."""
    settings = config.align[name]
    store = state_store(config, name, seed, root)
    policy = build_policy(config, name)
    if settings.full_fine_tuning:
        policy.network.unfreeze()
    else:
        add_lora(policy.network.module, settings.lora, seed=seed)
    preference = LoadedPreference(config, config.scorer_of(name), root, policy)
    method = build_method(settings, build_inputs(config, name, policy, preference, root=root), seed=seed)
    watch = build_watch(config, name, policy, preference, root=root)
    if config.launch.shard_network:
        policy.network.shard()  # what is loaded above may copy from it
    work_dir = store.folder / "output"  # DVC removes the outputs of a stage before it runs again
    with distributed.written_by_main(nullcontext(work_dir)) as made:
        options: dict[str, Any] = {"seed": seed, "watch": watch, "safety": config.safety, "store": store}
        metrics = align(method, policy, settings, made, tracker, **options)
        with distributed.written_by_main(atomic_path(Workspace(config, root).aligned(name, seed))) as folder:
            shutil.copytree(made, folder)
            write_json(folder / "metrics.json", metrics)
    if distributed.is_main():
        store.clear()
        shutil.rmtree(work_dir)


def state_store(config: Config, name: str, seed: int, root: Path) -> StateStore:
    """The store of the run's states, with the settings and inputs that they depend on."""
    method = config.align[name]
    settings = config.model_dump(mode="json", include={"model", "sampling"})
    settings |= {"align": {name: method.model_dump(mode="json")}, "training_seed": seed}
    workspace = Workspace(config, root)
    inputs: dict[str, str | Path | None] = {"model": config.model.path, "vae": config.model.vae}
    if method.needs_pairs:
        settings |= {"pairs": fingerprint_of_pairs(workspace.prepared.pairs_file("train"))}
        settings |= {"labels": config.labels.model_dump(mode="json")}
        inputs |= {"labels": config.labels.model}
    if method.scorers:
        inputs |= {"prompts": workspace.prepared.prompts_file("train")}
        keys = ("preference_model", "late_preference_model")
        inputs |= dict(zip(keys, map(workspace.preference_model, method.scorers), strict=False))
    settings |= {"inputs": fingerprints(inputs)}
    return StateStore(workspace.state("align", name, f"seed-{seed}"), settings)


def build_policy(config: Config, name: str) -> LatentDiffusion:
    """The base model with the method's sampler."""
    return build(config.model, config.align[name].sampling(config.sampling), best_device())


def build_inputs(
    config: Config, name: str, policy: LatentDiffusion, preference: LoadedPreference, *, root: Path
) -> Inputs:
    """The data and models that the method `name` may learn from."""
    workspace = Workspace(config, root)
    late = getattr(config.align[name], "late", None)

    def scorer(scoring: ScoringConfig) -> Scorer:
        if scoring.tiny_vae is not None:
            policy.autoencoder.preview = load_tiny_vae(scoring.tiny_vae, policy)
        first = preference.scorer(scoring)
        if late is None:
            return first
        return ByTime(first, load_scorer(config, late.preference_model, root, policy), at_most=late.at_most)

    def pairs() -> LabelledPairs:
        return load_pairs(workspace.prepared.pairs_file("train"), policy, config, cache=workspace.latents_cache)

    return Inputs(policy, workspace.prepared.prompts("train"), scorer, pairs)


def build_watch(
    config: Config, name: str, policy: LatentDiffusion, preference: LoadedPreference, *, root: Path
) -> Watch | None:
    """The watch of the method `name`, which generates images of the first validation prompts with eta 0.

    None if the method has none or the weights of its metric are missing; that is a ModelError if the watch may end the
    run.
    """
    settings = config.align[name].watch
    if settings is None:
        return None
    prompts = Workspace(config, root).prepared.prompts("validation", settings.num_prompts)
    needed = (settings.score,) if settings.stop_after_worse else ()
    metrics = build_metrics([settings.metric], policy.device, needed=needed)
    if not metrics:
        print(f"align {name} runs without a watch", flush=True)
        return None
    scorer = preference.scorer()
    text = scorer.encode(prompts)
    sampler = SamplerConfig(
        scheduler=config.model.scheduler,
        steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        eta=0.0,
    )
    seeds = [image_seed(settings.seed, prompt, 0) for prompt in prompts]
    size = min(BATCH, config.evaluate.batch_size)

    def paint() -> Tensor:
        with policy.network.precision():  # full fine-tuning trains a float32 network between half-precision parts
            return generate(policy, prompts, seeds, sampler=sampler, batch_size=size, label="watch")

    def preference_score(images: Tensor) -> Tensor:
        return scorer.score_images(images, text, torch.zeros((), dtype=torch.long)).cpu()

    def independent_score(images: Tensor) -> Tensor:
        return score(metrics, images, prompts)[settings.score]

    return Watch(settings, paint, preference_score, independent_score)
