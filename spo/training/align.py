"""The training loop of all methods: collect examples, shuffle them, update the policy, save checkpoints.

Unlike in the published loop, a smaller last batch counts by its size, gradients never cross rounds, and gradients are
clipped if the configuration says so.
"""

import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Generator, Tensor

from spo.config import AlignConfig, OptimizerConfig, SafetyConfig
from spo.errors import TrainingError
from spo.methods.method import E, Method, Round
from spo.models.latent_diffusion import LatentDiffusion
from spo.models.policy import save_policy
from spo.runtime import distributed
from spo.runtime.checkpoint import State, StateStore
from spo.runtime.device import memory_advice
from spo.runtime.files import write_json
from spo.runtime.pictures import strip, to_picture
from spo.runtime.progress import Progress
from spo.runtime.saver import Saver
from spo.tracking import Tracker
from spo.training.adamw import adamw
from spo.training.guards import FiniteGuard, StallDetector
from spo.training.history import Cost, History
from spo.training.updates import Updater
from spo.training.watch import Watch

Ratios = tuple[list[int], list[list[float]]]  # the timesteps of n examples, and their log-ratios of win and lose

SHORT = 10.0  # seconds of a round's updates for which a stop waits
REMEDY = "lower optimizer.learning_rate, set optimizer.max_grad_norm, or compute in bfloat16 or float32"


def align(
    method: Method[E],
    policy: LatentDiffusion,
    config: AlignConfig,
    folder: Path,
    tracker: Tracker,
    *,
    seed: int = 0,
    watch: Watch | None = None,
    safety: SafetyConfig | None = None,
    store: StateStore | None = None,
) -> dict[str, Any]:
    """Train the policy; write checkpoints/ and the history's tables to `folder` and return the metrics.

    watch: may end the run early, which the metrics then say. With a store the run continues from its newest state;
    `folder` must then hold what that run had written. Loading is no part of the cost.
    Raises TrainingError after an epoch without a kept example, after too many bad updates, if memory runs out, and if a
    state cannot be saved or belongs to another run.
    """
    run = _Alignment(method, policy, config, folder, tracker, seed, Cost(), watch, safety or SafetyConfig())
    saver = run.resume(store)
    with memory_advice(config.memory_remedy()), saver.saving_when_stopped():
        stopped_early = run.train(saver)
    run.history.write(folder)
    branched = sum(sums.branched for sums in run.history.timesteps.values())
    return {**asdict(run.cost), "kept_share": run.cost.num_examples / branched, "stopped_early": stopped_early}


@dataclass
class _Alignment(Generic[E]):
    """One run: everything that it changes, and where its results go."""

    method: Method[E]
    policy: LatentDiffusion
    config: AlignConfig
    folder: Path
    tracker: Tracker
    seed: int
    cost: Cost  # cost.rounds is the position of the run
    watch: Watch | None
    safety: SafetyConfig
    history: History = field(default_factory=History)
    examples_in_epoch: int = 0
    before: State | None = None  # in a round: how things stood before it; of a sharded network always
    update_seconds: float = math.inf  # of an update of the last round of several
    gathers: bool = field(default=False, init=False)  # whether states are gathered: a sharded network's

    def __post_init__(self) -> None:
        config = self.config.optimizer
        optimizer = adamw(
            self.policy.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            eight_bit=config.eight_bit,
        )
        guard = FiniteGuard(self.safety.max_skipped_in_a_row, REMEDY)
        self.updater = Updater(optimizer, guard, dtype=self.policy.dtype, max_grad_norm=config.max_grad_norm)

    def resume(self, store: StateStore | None) -> Saver:
        """Continue from the newest state, if there is one, and log its history again; the saver of the run's states."""
        saved = store.load() if store else None
        if saved:
            self._restore(saved)
            if distributed.is_main():
                print(f"align: continues after round {saved.number}", file=sys.stderr, flush=True)
        elif store and distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)  # left by a run without an undamaged state
        for row in self.history.updates:
            self.tracker.log_metrics(row, step=int(row["update"]))
        for row in self.history.looks:
            self._log_look(row)
        if store and self.updater.is_sharded:
            self.gathers, self.before = True, self._state()
        return Saver(
            store if distributed.is_main() else None,
            self.safety.save_every_seconds,
            lambda: self.before or self._state(),
            total=self.num_rounds,
            unit="round",
            resumed=saved.number if saved else None,
        )

    @property
    def num_rounds(self) -> int:
        """Of the whole run."""
        return self.config.epochs * self.method.rounds_per_epoch

    def _state(self) -> State:
        """Everything that the run has changed after `cost.rounds` rounds; the tensors are those in training."""
        tensors, updater = self.updater.state()
        values = {
            "updater": updater,
            "cost": asdict(self.cost),
            "history": self.history.to_json(),
            "examples_in_epoch": self.examples_in_epoch,
        }
        return State(self.cost.rounds, tensors, values)

    def _restore(self, saved: State) -> None:
        self.updater.restore(saved.tensors, saved.values["updater"])
        self.cost = Cost(**saved.values["cost"])
        self.history = History.from_json(saved.values["history"])
        self.examples_in_epoch = saved.values["examples_in_epoch"]

    def train(self, saver: Saver) -> bool:
        """Do the remaining rounds; whether the watch ended them early.

        A signal ends a round anywhere, and the state before the round is saved.
        """
        config, cost, per_epoch = self.config, self.cost, self.method.rounds_per_epoch
        save_at = {-(-self.num_rounds * i // config.checkpoints) for i in range(1, config.checkpoints + 1)}
        stuck = StallDetector(self.safety.stuck_after)
        if cost.rounds in save_at:  # the run may have been stopped before it was written
            save_checkpoint(self.policy, cost, self.folder / "checkpoints")
        if self._is_over():
            return True
        with Progress[Any](total=self.num_rounds, done=cost.rounds, label="align") as bar:
            for epoch in range(cost.rounds // per_epoch, config.epochs):
                start = time.perf_counter()
                for round_ in self.method.collect(epoch, skip=cost.rounds % per_epoch):
                    rows = self._train_on(round_, epoch, saver, start=start)
                    if cost.rounds in save_at:
                        save_checkpoint(self.policy, cost, self.folder / "checkpoints")
                    shown = rows[-1] if rows else {}
                    bar.update(**{name: shown[name] for name in ("loss", "kept", "score") if name in shown})
                    margin = max((tally.margin for tally in round_.tallies), default=1.0)
                    stuck.see(kept=round_.examples is not None, margin=margin, rows=rows)
                    if self._is_over():
                        return True
                    saver.save_if_due()
                    start = time.perf_counter()
        return False

    def _train_on(self, round_: Round[E], epoch: int, saver: Saver, *, start: float) -> list[dict[str, float]]:
        """Train once on a round's examples, shuffled; a row of measurements for each update.

        A stop goes back to the state before the round. Until the first step of the optimizer its tensors are those in
        training, so they need no copy. From there on the round is completed if its updates are short, else they are
        copied before. A sharded network's are gathered after each round, since a process that is stopped cannot wait
        for the others. start: when the round's collection started, on `time.perf_counter`'s clock.
        """
        config, cost, examples = self.config, self.cost, round_.examples
        rows: list[dict[str, float]] = []
        self.before = self.before or self._state()
        cost.rounds += 1
        with ExitStack() as rest:
            if examples is None:
                self._count_forwards()
            else:
                order = torch.randperm(len(examples), generator=Generator().manual_seed(self.seed + 7919 * cost.rounds))
                batches = order.to(examples.t.device).split(config.batch_size)
                size = config.micro_batch_size or config.batch_size
                remedy = f"set the method's micro_batch_size below {size}, or model.gradient_checkpointing to true"
                with memory_advice(remedy):
                    for i, index in enumerate(batches, 1):
                        row, ratios = self._gradient(examples[index])
                        if i == len(batches):
                            self._count_forwards()  # before the last step, since it waits for the other processes
                        if i == 1:
                            if self._completes(len(batches)):
                                rest.enter_context(saver.uninterruptible())
                            elif not self.gathers:
                                self.before = saver.hold(self.before)
                            first_step = time.perf_counter()
                        rows += self._step(row, ratios)
                if len(batches) > 1:
                    self.update_seconds = (time.perf_counter() - first_step) / (len(batches) - 1)
                cost.num_examples += len(examples)
                self.examples_in_epoch += len(examples)
            cost.seconds += time.perf_counter() - start
            self._record(rows, round_, epoch)
            if cost.rounds % self.method.rounds_per_epoch == 0:
                self._end_epoch()
            self.before = self._state() if self.gathers else None
        return rows

    def _completes(self, updates: int) -> bool:
        """Whether a stop waits for the rest of a round's updates: there is one, or they are short by the last round.

        With several processes only for one: a process that is stopped earlier gives the others no gradients.
        """
        short = distributed.count() == 1 and updates * self.update_seconds <= SHORT
        return updates == 1 or short

    def _count_forwards(self) -> None:
        """Add what all processes have used since the last call to the cost."""
        cost, network, autoencoder = self.cost, self.policy.network, self.policy.autoencoder
        made = distributed.add_up({"forwards": network.forwards, "decodes": autoencoder.decodes})
        cost.unet_forwards += round(made["forwards"])
        cost.vae_decodes += int(made["decodes"])
        network.forwards = autoencoder.decodes = 0

    def _gradient(self, examples: E) -> tuple[dict[str, float], list[Ratios]]:
        """The gradient of an update, with `micro_batch_size` examples in memory at a time.

        Each process takes its share of the examples; returned are the measurements and log-ratios of all.
        """
        config = self.config
        ratios: list[Ratios] = []
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.policy.device))
        shard = torch.arange(len(examples), device=examples.t.device)[distributed.share(len(examples))]
        size, largest = config.micro_batch_size or len(examples), -(-len(examples) // distributed.count())
        micro_batches = shard.split(size) if len(shard) else ()
        # all processes of a sharded network make equally many passes
        padding = self.policy.network.is_sharded and len(micro_batches) < -(-largest // size)
        for i, index in enumerate(micro_batches, 1):
            part = examples[index]
            loss = self.method.loss(part)
            self.updater.backward(loss.value * (len(part) / config.batch_size), last=i == len(micro_batches))
            for name, value in {"loss": loss.value.detach(), **loss.metrics}.items():
                total[name] += value * (len(part) / len(examples))
            if loss.log_ratio is not None:
                ratios.append((part.t.tolist(), loss.log_ratio.tolist()))
        if padding:
            forwards = self.policy.network.forwards
            self.updater.backward(self.method.loss(examples[:1]).value * 0)
            self.policy.network.forwards = forwards
        norm = self.updater.clip_gradient()
        *parts, grad_norm = torch.stack([*total.values(), norm]).tolist()  # one transfer
        row = {**distributed.add_up(dict(zip(total, parts, strict=True))), "grad_norm": grad_norm}
        return row, list(chain.from_iterable(distributed.gather_objects(ratios)))

    def _step(self, row: dict[str, float], ratios: list[Ratios]) -> list[dict[str, float]]:
        """Make the update by the gradient; its measurements, or none if it is skipped. All processes do the same."""
        config, cost = self.config, self.cost
        done = (cost.rounds - 1) / self.num_rounds
        rate = config.optimizer.learning_rate * rate_share(cost.updates, done, config.optimizer)
        if not self.updater.step(row["loss"], row["grad_norm"], learning_rate=rate):
            cost.skipped = self.updater.guard.skipped
            return []
        cost.updates += 1
        for t, log_ratio in ratios:
            self.history.count_ratios(self.policy.timesteps.tolist(), t, log_ratio)
        return [{"update": cost.updates, **row}]

    def _end_epoch(self) -> None:
        if not self.examples_in_epoch:
            sums = self.history.timesteps.values()
            margin = sum(each.margin for each in sums) / max(1, sum(each.branched for each in sums))
            raise TrainingError(f"no example was kept in a whole epoch: {self.config.empty_remedy(margin)}")
        self.examples_in_epoch = 0

    def _record(self, rows: Sequence[dict[str, float]], round_: Round[E], epoch: int) -> None:
        cost = self.cost
        for row in rows:
            row |= {"epoch": epoch, "round": cost.rounds, **round_.measured}
            row |= {"seconds": cost.seconds, "unet_forwards": cost.unet_forwards}
            self.tracker.log_metrics(row, step=int(row["update"]))
        self.history.updates.extend(rows)
        self.history.count(self.policy.timesteps.tolist(), round_.tallies)

    def _is_over(self) -> bool:
        """Let the watch look if a look is due; whether it ends the run, which then gets a checkpoint.

        Its time does not count as training. A resumed run takes a look that the stopped one had missed, and keeps the
        result of one that it had taken. If there are several processes, the first one decides.
        """
        watch, looks = self.watch, self.history.looks
        if watch is None:
            return False
        if watch.is_due(self.cost, looks):
            row, pictures = watch.look(self.cost, looks)
            looks.append(row)
            self._log_look(row)
            sheet = strip([to_picture(each) for each in pictures])
            self.tracker.log_image(f"watch/round-{self.cost.rounds:06d}", sheet)
        elif not looks or looks[-1]["round"] != self.cost.rounds:
            return False
        over = distributed.gather_objects(watch.ends(looks))[0]
        if over:
            save_checkpoint(self.policy, self.cost, self.folder / "checkpoints")
        return over

    def _log_look(self, row: dict[str, float]) -> None:
        self.tracker.log_metrics({f"watch_{name}": value for name, value in row.items()}, step=int(row["update"]))


def save_checkpoint(policy: LatentDiffusion, cost: Cost, folder: Path) -> None:
    """Write the policy and its cost to <folder>/step-<rounds>."""
    checkpoint = folder / f"step-{cost.rounds:06d}"
    save_policy(policy.network, checkpoint)
    write_json(checkpoint / "cost.json", asdict(cost))


def rate_share(update: int, done: float, config: OptimizerConfig) -> float:
    """The share of the learning rate at an update (counted from 0), when the share `done` of all rounds is done."""
    warm_up = min(1.0, (update + 1) / (config.warmup_updates + 1))
    return warm_up if config.schedule == "constant" else warm_up * (1 - done)
