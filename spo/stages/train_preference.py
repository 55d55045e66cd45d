"""Train the preference model, of either kind, on the prepared pairs, or copy the configured checkpoint."""

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.core.types import LabelledPairs
from spo.models.load import build
from spo.runtime import distributed
from spo.runtime.checkpoint import Saver, State, StateStore
from spo.runtime.device import best_device, memory_advice
from spo.runtime.files import atomic_path, write_csv, write_json
from spo.runtime.hashing import fingerprints
from spo.runtime.progress import Progress, progress
from spo.tracking import Tracker
from spo.training.latent_preference import LatentPreferenceTraining
from spo.training.pairs import fingerprint_of_pairs, load_pairs
from spo.training.preference import StepAwareTraining
from spo.training.preference_steps import PreferenceTraining
from spo.workspace import Workspace

TRAININGS: dict[str, type[PreferenceTraining]] = {"pixel": StepAwareTraining, "latent": LatentPreferenceTraining}


def run(config: Config, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write model/, accuracy.csv, history.csv and metrics.json to runs/<profile>/train_preference."""
    start = time.perf_counter()
    settings = config.train_preference
    workspace, device = Workspace(config, root), best_device()
    prepared, cache = workspace.prepared, workspace.latents_cache
    base = build(config.model, config.sampling, device)
    validation = None
    if config.prepare.preferences is not None:
        validation = load_pairs(
            prepared.pairs_file("validation"), base, config, cache=cache, limit=settings.evaluate_pairs
        )
    training = TRAININGS[settings.kind].start(base, config)
    store = None if settings.checkpoint else state_store(config, root)
    saved = store.load() if store else None
    if saved:
        training.updater.restore(saved.tensors, saved.values["updater"])
        print(f"train_preference: continues from step {saved.number}", file=sys.stderr, flush=True)
        done = Done(**saved.values["done"])
    else:
        done = Done(accuracy=_accuracies(training, validation, "start", config))
    if store:
        pairs = load_pairs(prepared.pairs_file("train"), base, config, cache=cache)
        start -= done.seconds  # spent by earlier processes
        _train(training, pairs, config, store, done, tracker, start=start)
        done.accuracy += _accuracies(training, validation, "trained", config)
    with distributed.written_by_main(atomic_path(workspace.train_preference)) as folder:
        training.save(folder / "model")
        write_csv(folder / "accuracy.csv", done.accuracy)
        write_csv(folder / "history.csv", done.history)
        metrics = {**_metrics(done.accuracy, done.history), "skipped": training.updater.guard.skipped}
        metrics["unet_forwards"] = round(done.step * settings.batch_size * settings.forwards_per_pair(config.sampling))
        write_json(folder / "metrics.json", {**metrics, "seconds": round(time.perf_counter() - start, 1)})
    for row in done.accuracy:
        tracker.log_metrics({f"accuracy_{row['model']}": row["accuracy"]}, step=row["timestep"])
    if store and distributed.is_main():
        store.clear()


@dataclass
class Done:
    """A training's progress and measurements, without its weights."""

    accuracy: list[dict[str, Any]]  # of the start model, later also of the trained one
    history: list[dict[str, float]] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0  # spent by all processes of the stage when the state was saved


def state_store(config: Config, root: Path) -> StateStore:
    """The store of the stage's states, with the settings and inputs that they depend on."""
    settings = config.model_dump(mode="json", include={"seed", "model", "sampling", "labels", "train_preference"})
    inputs: dict[str, str | Path | None] = {
        "model": config.model.path,
        "vae": config.model.vae,
        **{name: source for name, (source, _) in config.train_preference.repositories().items()},
        "labels": config.labels.model,
    }
    workspace = Workspace(config, root)
    pairs = fingerprint_of_pairs(workspace.prepared.pairs_file("train"))
    settings |= {"inputs": {"pairs": pairs, **fingerprints(inputs)}}
    return StateStore(workspace.state("train_preference"), settings)


def _train(
    training: PreferenceTraining,
    pairs: LabelledPairs,
    config: Config,
    store: StateStore,
    done: Done,
    tracker: Tracker,
    *,
    start: float,
) -> None:
    """Train to the end and update `done`; `start` is when the stage started, on `time.perf_counter`'s clock."""

    def snapshot() -> State:
        tensors, values = training.updater.state()
        done.seconds = time.perf_counter() - start
        return State(done.step, tensors, {"updater": values, "done": asdict(done)})

    settings = config.train_preference
    for past in done.history:
        _log(past, settings.log_every, tracker)
    saver = Saver(store if distributed.is_main() else None, config.safety.save_every_seconds, snapshot)
    with (
        Progress[None](total=settings.steps, done=done.step, label="train_preference") as bar,
        memory_advice(settings.memory_remedy()),
        saver.saving_when_stopped(),
    ):
        for step in range(done.step, settings.steps):
            with saver.uninterruptible():
                row = training.step(pairs, step, seed=config.seed)
                done.step += 1
                done.history += [{"step": done.step, **row}] if row else []
            if row:
                bar.update(loss=row["loss"], accuracy=row["accuracy"])
                _log(done.history[-1], settings.log_every, tracker)
            saver.save_if_due()


def _log(row: dict[str, float], every: int, tracker: Tracker) -> None:
    if row["step"] % every == 0:
        tracker.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))


def _accuracies(
    training: PreferenceTraining, pairs: LabelledPairs | None, name: str, config: Config
) -> list[dict[str, Any]]:
    """A row for each timestep; none without pairs."""
    rows: list[dict[str, Any]] = []
    if pairs is None:
        return rows
    for timestep in progress(config.train_preference.evaluate_timesteps, label=f"accuracy of the {name} model"):
        accuracy, count = training.accuracy(pairs, timestep, seed=config.seed)
        rows.append({"timestep": timestep, "model": name, "accuracy": accuracy, "n": count})
    return rows


def _metrics(accuracy: list[dict[str, Any]], history: list[dict[str, float]]) -> dict[str, Any]:
    by_model: dict[str, dict[str, float]] = {}
    for row in accuracy:
        by_model.setdefault(row["model"], {})[f"t_{row['timestep']}"] = round(row["accuracy"], 4)
    tail = history[-50:]
    loss = {"loss": round(sum(row["loss"] for row in tail) / len(tail), 4)} if tail else {}
    return {"accuracy": by_model, "pairs": accuracy[0]["n"] if accuracy else 0, "steps": len(history), **loss}
