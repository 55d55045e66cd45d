"""A rough estimate of how long `check` takes, printed before it starts."""

import time

import torch

from spo.commands.architectures import outputs_of_network, preference_weights
from spo.commands.memory_estimate import base_bytes, jobs
from spo.config import Config
from spo.models.schedulers import build_scheduler
from spo.runtime.device import best_device

SLOWER = 10  # the whole run takes about so many times what the products of the network alone take
LOADED = 5e8  # bytes a second
STARTED, WARMED = 2.0, 30.0  # seconds of a stage, and of a GPU's first use


def rough_seconds(small: Config) -> float:
    """About how long the miniature takes, from the size of the networks and how fast this machine multiplies."""
    flops = 2 * sum(outputs_of_network(small.model).products.values())
    passes = 2 if small.counted_sampling.guidance_scale > 1 else 1
    steps = max(sampler.steps for sampler in small.evaluate.samplers.values())
    count = evaluation_forwards(small) + small.evaluate.batch_size * steps * passes
    for name in small.train_preference:
        training = small.preference_models[name]
        count += 3 * training.steps * training.batch_size * training.forwards_per_pair(small.counted_sampling)
    for method in (small.align[name] for name in small.methods):
        sampled = getattr(method, "prompts_per_rollout", 0) * small.sampling.steps
        rollout = sampled * getattr(method, "candidates", 2)
        updates = 4 * (sampled or method.batch_size)  # the policy's forward and backward, and the reference's forward
        count += method.epochs * (rollout + updates) * passes
    read = len(jobs(small)) * sum(base_bytes(small))
    read += sum(12 * preference_weights(small.model, small.preference_models[name]) for name in small.train_preference)
    starts = STARTED * len(jobs(small)) + (WARMED if torch.cuda.is_available() else 0)
    return SLOWER * count * flops / _product_rate(small.model.dtype) + read / LOADED + starts


def _product_rate(dtype: str) -> float:
    """Operations a second of a large product on this machine."""
    device, size = best_device(), 4096 if torch.cuda.is_available() else 512
    matrix = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    (matrix @ matrix)[0, 0].item()
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()
    return 2 * size**3 / (time.perf_counter() - start)


def evaluation_forwards(config: Config) -> float:
    """Network forwards (samples) of the evaluation."""
    evaluate, seeds = config.evaluate, len(config.training_seeds)
    columns = 1 + len(config.methods) * seeds + len(evaluate.published)
    checkpoints = sum(config.align[name].checkpoints * seeds for name in config.methods)
    test, validation = evaluate.num_prompts * evaluate.images_per_prompt * columns, evaluate.num_validation_prompts
    steps = {name: len(build_scheduler(sampler).timesteps) for name, sampler in evaluate.samplers.items()}
    sampled = test * sum(steps.values()) + validation * (1 + checkpoints) * steps[evaluate.deciding]
    return sampled * (1.0 if config.model.is_distilled else 2.0)
