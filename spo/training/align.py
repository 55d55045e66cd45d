"""The one training loop of all methods: collect, shuffle, update; save checkpoints along the way.

Differs from the published loop in that a last, partial batch counts by its size, that gradients never cross
rollouts, and that clipping is done when it is asked for.
"""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from spo.config import OptimizerConfig, SpoConfig
from spo.core.rollout import Segment
from spo.core.types import Loss, Pairs
from spo.errors import ConfigError, TrainingError
from spo.files import write_json
from spo.methods.spo import Spo
from spo.models.base import LatentDiffusion
from spo.models.lora import save_lora
from spo.progress import Progress
from spo.tables import write_csv
from spo.tracking import Tracker


@dataclass
class Cost:
    """What training has taken so far."""

    rollouts: int = 0
    updates: int = 0
    num_pairs: int = 0
    unet_forwards: int = 0
    seconds: float = 0.0


@dataclass
class History:
    """One row an update, and what became of the candidates at each timestep."""

    updates: list[dict[str, float]] = field(default_factory=list)
    timesteps: dict[int, list[Segment]] = field(default_factory=lambda: defaultdict(list))

    def write(self, folder: Path) -> None:
        write_csv(folder / "history.csv", self.updates)
        rows = [
            {
                "timestep": t,
                "branched": sum(segment.num_branched for segment in segments),
                "kept": sum(segment.num_kept for segment in segments),
                "margin": sum(segment.margin for segment in segments) / len(segments),
            }
            for t, segments in sorted(self.timesteps.items(), reverse=True)
        ]
        write_csv(folder / "timesteps.csv", rows)


def align(method: Spo, policy: LatentDiffusion, config: SpoConfig, folder: Path, tracker: Tracker) -> dict[str, Any]:
    """Train the policy; leaves checkpoints/, history.csv and timesteps.csv in `folder` and returns the metrics.

    Raises TrainingError after an epoch in which no pair was kept.
    """
    parameters = policy.parameters()
    optimizer = build_optimizer(parameters, config.optimizer)
    history, cost = History(), Cost()
    num_rollouts = config.epochs * method.rollouts_per_epoch
    save_at = {-(-num_rollouts * i // config.checkpoints) for i in range(1, config.checkpoints + 1)}
    with Progress(total=num_rollouts, label="align") as bar:
        for epoch in range(config.epochs):
            pairs_before, start = cost.num_pairs, time.perf_counter()
            for segments in method.collect(epoch):
                cost.rollouts += 1
                rows = _update(method, policy, parameters, optimizer, config, segments, cost)
                cost.seconds += time.perf_counter() - start
                _record(history, rows, segments, epoch, cost, tracker)
                shown = {name: f"{rows[-1][name]:.3f}" for name in ("loss", "kept", "score")} if rows else {"kept": 0}
                bar.update(**shown)
                if cost.rollouts in save_at:
                    checkpoint = folder / "checkpoints" / f"step-{cost.rollouts:06d}"
                    save_lora(policy, checkpoint)
                    write_json(checkpoint / "cost.json", asdict(cost))
                start = time.perf_counter()
            if cost.num_pairs == pairs_before:
                raise TrainingError(_no_pairs(config, history))
    history.write(folder)
    branched = sum(segment.num_branched for segments in history.timesteps.values() for segment in segments)
    return {**asdict(cost), "kept_share": cost.num_pairs / (branched * config.branch_steps)}


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, of 8 bits where that is asked for and bitsandbytes is there (ConfigError where it is not)."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if not config.eight_bit:
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimizer.eight_bit=true needs bitsandbytes and a GPU; `pip install -e .[gpu]`, or set it to false"
        ) from None
    return AdamW8bit(parameters, **options)


def _update(
    method: Spo,
    policy: LatentDiffusion,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: SpoConfig,
    segments: list[Segment],
    cost: Cost,
) -> list[dict[str, float]]:
    """Train once on a rollout's pairs, shuffled; one row of measurements an update."""
    kept = [pairs for segment in segments for pairs in segment.pairs if len(pairs)]
    rows = []
    if kept:
        pairs = Pairs.cat(kept)
        order = torch.randperm(len(pairs), generator=Generator().manual_seed(config.seed + 7919 * cost.rollouts))
        for index in order.to(pairs.t.device).split(config.batch_size):
            loss = method.loss(pairs[index])
            (loss.value * (len(index) / config.batch_size)).backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            cost.updates += 1
            rows.append({"update": cost.updates, **_numbers(loss, norm)})
        cost.num_pairs += len(pairs)
    cost.unet_forwards = policy.forwards
    return rows


def _numbers(loss: Loss, norm: torch.Tensor) -> dict[str, float]:
    values = torch.stack([loss.value.detach(), norm, *loss.metrics.values()]).tolist()  # one transfer
    return dict(zip(["loss", "grad_norm", *loss.metrics], values, strict=True))


def _record(
    history: History,
    rows: list[dict[str, float]],
    segments: list[Segment],
    epoch: int,
    cost: Cost,
    tracker: Tracker,
) -> None:
    branched = sum(segment.num_branched for segment in segments)
    shared = {
        "epoch": epoch,
        "rollout": cost.rollouts,
        "kept": sum(segment.num_kept for segment in segments) / branched,
        "margin": sum(segment.margin for segment in segments) / len(segments),
        "score": sum(segment.score for segment in segments) / len(segments),
        "seconds": cost.seconds,
        "unet_forwards": cost.unet_forwards,
    }
    for row in rows:
        row.update(shared)
        tracker.log_metrics(row, step=int(row["update"]))
    history.updates.extend(rows)
    for segment in segments:
        history.timesteps[segment.t].append(segment)


def _no_pairs(config: SpoConfig, history: History) -> str:
    margins = [segment.margin for segments in history.timesteps.values() for segment in segments]
    return (
        f"no pair was kept in a whole epoch: threshold={config.threshold}, but the mean margin is "
        f"{sum(margins) / len(margins):.3g}; lower the method's threshold, or train the preference model for longer"
    )
