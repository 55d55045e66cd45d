"""Step-aware Preference Optimization: align text-to-image diffusion models with generic preferences.

What a researcher needs is importable from `spo`; each name is loaded when it is first used:

    Config, load_config      the settings of a profile
    Workspace                where a profile's files are
    build                    a diffusion or flow model with its sampler, from its settings
    load_policy              load a trained LoRA, or whole network, into that model
    load_preference_model    a trained step-aware preference model, from its folder
    PreferenceScorer         scores images by it: higher is better
    KeyedNoise               random numbers keyed by seed, epoch and prompt
    rollout                  sample prompts and yield scored candidates, step by step (the paper's algorithm 1)
    Spo, D3po, DiffusionDpo  the methods: each collects examples and computes their loss
    align, wrap              SPO on a diffusers pipeline and a reward of your own (docs/api.md)
    SpoConfig, D3poConfig, GrpoConfig, StepGrpoConfig, LoraConfig, OptimizerConfig, SamplingConfig  settings for them

For example, in a project in which `python -m spo repro` has run:

    import spo
    from spo.methods.sampled import keep_pairs

    config = spo.load_config()
    workspace = spo.Workspace(config)
    model = spo.build(config.model, config.sampling, "cpu")
    scorer = spo.PreferenceScorer(spo.load_preference_model(workspace.preference_model("pixel")), device=model.device)
    prompts = workspace.prepared.prompts("validation", limit=4)
    segments = spo.rollout(
        model,
        scorer,
        model.encode(prompts),
        scorer.encode(prompts),
        candidates=4,
        first_step=1,
        branch_steps=1,
        noise=spo.KeyedNoise(0, 0, range(len(prompts))),
    )
    for segment in segments:
        kept = keep_pairs(segment, threshold=0.0)
        print(f"t={kept.times[0]}: {kept.num_kept} pairs, mean score {kept.score:.3f}")
"""

import importlib
from typing import Any

_HOMES = {
    "Config": "spo.config",
    "D3poConfig": "spo.config",
    "GrpoConfig": "spo.config",
    "SamplingConfig": "spo.config",
    "SpoConfig": "spo.config",
    "StepGrpoConfig": "spo.config",
    "LoraConfig": "spo.config",
    "OptimizerConfig": "spo.config",
    "align": "spo.api",
    "wrap": "spo.api",
    "D3po": "spo.methods.d3po",
    "DiffusionDpo": "spo.methods.diffusion_dpo",
    "KeyedNoise": "spo.core.noise",
    "PreferenceScorer": "spo.preference.score",
    "Spo": "spo.methods.spo",
    "Workspace": "spo.workspace",
    "build": "spo.models.load",
    "load_config": "spo.config",
    "load_policy": "spo.models.policy",
    "load_preference_model": "spo.preference.checkpoint",
    "rollout": "spo.core.rollout",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
