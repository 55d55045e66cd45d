"""The one training loop of all methods: collect, shuffle, update; save checkpoints along the way.

Differs from the published loop in that a last, partial batch counts by its size, that gradients never cross
rounds, and that clipping is done when it is asked for.
"""

import math
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from spo.config import AlignConfig, OptimizerConfig, SafetyConfig
from spo.errors import ConfigError, TrainingError
from spo.methods.method import E, Method, Round
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.policy import save_policy
from spo.runtime import distributed
from spo.runtime.checkpoint import Saver, StateStore
from spo.runtime.device import memory_advice
from spo.runtime.files import write_json
from spo.runtime.pictures import plain_sheet, to_picture
from spo.runtime.progress import Progress
from spo.tracking import Tracker
from spo.training.guards import FiniteGuard, StallDetector
from spo.training.history import Cost, History
from spo.training.scaling import LossScale
from spo.training.state import State
from spo.training.watch import Watch


def align(
    method: Method[E],
    policy: LatentDiffusion,
    config: AlignConfig,
    folder: Path,
    tracker: Tracker,
    *,
    seed: int = 0,
    cost: Cost | None = None,
    watch: Watch | None = None,
    safety: SafetyConfig | None = None,
    store: StateStore | None = None,
) -> dict[str, Any]:
    """Train the policy; leaves checkpoints/ and the history's tables in `folder` and returns the metrics.

    cost: what preparing the method took; watch: looks on, and may end the run early, which the metrics then tell.
    With a store the run goes on from its newest state; `folder` must then have what that run had left there.
    Raises TrainingError after an epoch in which no example was kept, where updates are not finite, where memory is
    short, and where a state cannot be saved or is another run's.
    """
    safety = safety or SafetyConfig()
    optimizer = build_optimizer(policy.network.parameters(), config.optimizer)
    guard = FiniteGuard(safety.max_skipped_in_a_row)
    state = State(optimizer, guard, LossScale.of(policy.dtype), cost or Cost())
    saved = store.load() if store else None
    if saved:
        state.restore(policy, saved)
        if distributed.is_main():
            print(f"align: goes on after round {saved.number}", file=sys.stderr, flush=True)
    elif store and distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)  # what a run left that has no whole state
    for row in state.history.updates:
        tracker.log_metrics(row, step=int(row["update"]))
    for row in state.history.looks:
        _log_look(row, tracker)
    saver = Saver(store if distributed.is_main() else None, safety.save_every_seconds, lambda: state.snapshot(policy))
    stuck = StallDetector(safety.stuck_after)
    with memory_advice(config.memory_remedy()), saver.saving_when_stopped():
        stopped_early = _rounds(method, policy, config, state, folder, tracker, saver, stuck, seed=seed, watch=watch)
    return _finish(state, folder, stopped_early=stopped_early)


def _rounds(
    method: Method[E],
    policy: LatentDiffusion,
    config: AlignConfig,
    state: State,
    folder: Path,
    tracker: Tracker,
    saver: Saver,
    stuck: StallDetector,
    *,
    seed: int,
    watch: Watch | None,
) -> bool:
    """All rounds that are left; whether the watch ended them early.

    A signal ends a round anywhere, unless it goes through the networks at once; what is saved is the end of the round
    before.
    """
    per_epoch = method.rounds_per_epoch
    num_rounds = config.epochs * per_epoch
    at_once = min(config.batch_size, config.micro_batch_size or config.batch_size)
    save_at = {-(-num_rounds * i // config.checkpoints) for i in range(1, config.checkpoints + 1)}
    if _is_over(watch, state, policy, folder, tracker):
        return True
    with Progress[Any](total=num_rounds, done=state.cost.rounds, label="align") as bar:
        for epoch in range(state.cost.rounds // per_epoch, config.epochs):
            start = time.perf_counter()
            for round_ in method.collect(epoch, skip=state.cost.rounds % per_epoch):
                several = round_.examples is not None and len(round_.examples) > at_once
                with saver.rollback_on_stop() if several else saver.uninterruptible():
                    rows = _train(method, policy, config, state, round_, seed=seed)
                    if state.cost.rounds % per_epoch == 0:
                        _end_epoch(state, config)
                    state.cost.seconds += time.perf_counter() - start
                    _record(state, rows, round_, epoch, policy, tracker)
                    if state.cost.rounds in save_at:
                        save_checkpoint(policy, state.cost, folder / "checkpoints")
                bar.update(**{name: rows[-1][name] for name in ("loss", "kept", "score") if rows and name in rows[-1]})
                margin = max((tally.margin for tally in round_.tallies), default=1.0)
                stuck.see(kept=round_.examples is not None, margin=margin, rows=rows)
                if _is_over(watch, state, policy, folder, tracker):
                    return True
                saver.save_if_due()
                start = time.perf_counter()
    return False


def _end_epoch(state: State, config: AlignConfig) -> None:
    if not state.examples_in_epoch:
        raise TrainingError(_none_kept(config, state.history))
    state.examples_in_epoch = 0


def _finish(state: State, folder: Path, *, stopped_early: bool) -> dict[str, Any]:
    """Write the tables; the run's metrics."""
    state.history.write(folder)
    branched = sum(sums.branched for sums in state.history.timesteps.values())
    return {**asdict(state.cost), "kept_share": state.cost.num_examples / branched, "stopped_early": stopped_early}


def _is_over(watch: Watch | None, state: State, policy: LatentDiffusion, folder: Path, tracker: Tracker) -> bool:
    """Let the watch look if it is time; whether it ends the run, which then leaves a checkpoint.

    What it takes is not counted as training. A look that a stopped run still owed is taken by the one that goes on, and
    the verdict of one that it had taken is kept. Of several processes the first one's eyes count.
    """
    looks = state.history.looks
    if watch is None:
        return False
    if watch.is_due(state.cost, looks):
        row, pictures = watch.look(state.cost, looks)
        looks.append(row)
        _log_look(row, tracker)
        sheet = plain_sheet([[to_picture(each) for each in pictures]])
        tracker.log_image(f"watch/round-{state.cost.rounds:06d}", sheet)
    elif not looks or looks[-1]["round"] != state.cost.rounds:
        return False
    over = distributed.gather_objects(watch.ends(looks))[0]
    if over:
        save_checkpoint(policy, state.cost, folder / "checkpoints")
    return over


def _log_look(row: dict[str, float], tracker: Tracker) -> None:
    tracker.log_metrics({f"watch_{name}": value for name, value in row.items()}, step=int(row["update"]))


def save_checkpoint(policy: LatentDiffusion, cost: Cost, folder: Path) -> None:
    """Write <folder>/step-<rounds>: the policy, and what it took to get there."""
    checkpoint = folder / f"step-{cost.rounds:06d}"
    save_policy(policy.network, checkpoint)
    write_json(checkpoint / "cost.json", asdict(cost))


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, of 8 bits where that is asked for and bitsandbytes is there (ConfigError where it is not)."""
    rate, decay = config.learning_rate, config.weight_decay
    if not config.eight_bit:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimizer.eight_bit=true needs bitsandbytes and a GPU; `pip install -e .[gpu]`, or set it to false"
        ) from None
    return AdamW8bit(parameters, lr=rate, weight_decay=decay)


def _train(
    method: Method[E], policy: LatentDiffusion, config: AlignConfig, state: State, round_: Round[E], *, seed: int
) -> list[dict[str, float]]:
    """Train once on a round's examples, shuffled; one row of measurements an update."""
    cost, examples, rows = state.cost, round_.examples, []
    cost.rounds += 1
    if examples is not None:
        order = torch.randperm(len(examples), generator=Generator().manual_seed(seed + 7919 * cost.rounds))
        with memory_advice(_smaller_updates(config)):
            for index in order.to(examples.t.device).split(config.batch_size):
                row = _update(method, policy, config, state, examples[index])
                rows += [row] if row else []
        cost.num_examples += len(examples)
        state.examples_in_epoch += len(examples)
    network, autoencoder = policy.network, policy.autoencoder
    made = distributed.add_up({"forwards": network.forwards, "decodes": autoencoder.decodes})
    cost.unet_forwards += round(made["forwards"])
    cost.vae_decodes += int(made["decodes"])
    network.forwards = autoencoder.decodes = 0
    return rows


def _update(
    method: Method[E], policy: LatentDiffusion, config: AlignConfig, state: State, examples: E
) -> dict[str, float] | None:
    """One step of the optimizer; the examples go through the networks `micro_batch_size` at a time.

    Of several processes each takes its share of the examples, and all make the same step.
    None, and no weight is changed, where loss or gradient is not finite; in float16 that may be the loss scale's doing,
    which is then halved.
    """
    parameters, optimizer, cost = policy.network.parameters(), state.optimizer, state.cost
    done = (cost.rounds - 1) / (config.epochs * method.rounds_per_epoch)
    ratios: list[tuple[list[int], list[list[float]]]] = []
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=policy.device))
    shard = torch.arange(len(examples), device=examples.t.device)[distributed.share(len(examples))]
    for index in shard.split(config.micro_batch_size or len(examples)) if len(shard) else ():
        part = examples[index]
        loss = method.loss(part)
        state.scale.scale(loss.value * (len(part) / config.batch_size)).backward()
        for name, value in {"loss": loss.value.detach(), **loss.metrics}.items():
            total[name] += value * (len(part) / len(examples))
        if loss.log_ratio is not None:
            ratios.append((part.t.tolist(), loss.log_ratio.tolist()))
    distributed.sum_gradients(parameters)
    state.scale.unscale(parameters)
    names, values = list(total), [*total.values()]
    norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm or float("inf"))
    *parts, grad_norm = torch.stack([*values, norm]).tolist()  # one transfer
    row = {**distributed.add_up(dict(zip(names, parts, strict=True))), "grad_norm": grad_norm}
    if math.isfinite(row["loss"]) and state.scale.overflowed(math.isfinite(row["grad_norm"])):
        optimizer.zero_grad()
        return None
    mend = "lower optimizer.learning_rate, set optimizer.max_grad_norm, or compute in bfloat16 or float32"
    if not state.guard.allows(row["loss"], row["grad_norm"], mend=mend):
        optimizer.zero_grad()
        cost.skipped = state.guard.skipped
        return None
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.learning_rate * rate_share(cost.updates, done, config.optimizer)
    optimizer.step()
    optimizer.zero_grad()
    cost.updates += 1
    for t, log_ratio in chain.from_iterable(distributed.gather_objects(ratios)):
        state.history.count_ratios(policy.timesteps.tolist(), t, log_ratio)
    return {"update": cost.updates, **row}


def rate_share(update: int, done: float, config: OptimizerConfig) -> float:
    """The share of the learning rate at the update'th update, counted from 0, when `done` of all rounds are done."""
    warm_up = min(1.0, (update + 1) / (config.warmup_updates + 1))
    return warm_up if config.schedule == "constant" else warm_up * (1 - done)


def _record(
    state: State,
    rows: list[dict[str, float]],
    round_: Round[E],
    epoch: int,
    policy: LatentDiffusion,
    tracker: Tracker,
) -> None:
    cost = state.cost
    shared = {"epoch": epoch, "round": cost.rounds, **round_.measured}
    shared |= {"seconds": cost.seconds, "unet_forwards": cost.unet_forwards}
    for row in rows:
        row.update(shared)
        tracker.log_metrics(row, step=int(row["update"]))
    state.history.updates.extend(rows)
    state.history.count(policy.timesteps.tolist(), round_.tallies)


def _none_kept(config: AlignConfig, history: History) -> str:
    sums = history.timesteps.values()
    margin = sum(each.margin for each in sums) / max(1, sum(each.branched for each in sums))
    return f"no example was kept in a whole epoch: {config.empty_remedy(margin)}"


def _smaller_updates(config: AlignConfig) -> str:
    now = config.micro_batch_size or config.batch_size
    return f"set the method's micro_batch_size below {now}, or model.gradient_checkpointing to true"
