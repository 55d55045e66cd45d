"""Train one preference model, of either kind, on the prepared pairs, or copy its checkpoint."""

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spo.config import Config
from spo.core.types import LabelledPairs
from spo.evaluation.candidate_agreement import candidate_agreement
from spo.models.load import build
from spo.runtime import distributed
from spo.runtime.checkpoint import State, StateStore
from spo.runtime.device import best_device, memory_advice
from spo.runtime.files import atomic_path, write_csv, write_json
from spo.runtime.hashing import fingerprints
from spo.runtime.progress import Progress, progress
from spo.runtime.saver import Saver
from spo.tracking import Tracker
from spo.training.custom_preference import CustomPreference
from spo.training.latent_preference import LatentPreferenceTraining
from spo.training.pair_filter import filter_pairs
from spo.training.pairs import fingerprint_of_pairs, load_pairs
from spo.training.preference import StepAwareTraining
from spo.training.preference_steps import PreferenceTraining
from spo.workspace import Workspace

TRAININGS: dict[str, Any] = {
    "pixel": StepAwareTraining,
    "latent": LatentPreferenceTraining,
    "custom": CustomPreference,
}


def run(config: Config, name: str, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write the model to runs/<profile>/preference_models/<name>, its measurements to .../train_preference/<name>.

    The measurements are accuracy.csv, candidates.csv, history.csv and metrics.json.
    """
    start = time.perf_counter()
    settings = config.preference_models[name]
    workspace, device = Workspace(config, root), best_device()
    base = build(config.model, config.sampling, device)

    def pairs_of(side: str, *, limit: int | None = None) -> LabelledPairs:
        options: dict[str, Any] = {"cache": workspace.latents_cache, "limit": limit}
        return load_pairs(workspace.prepared.pairs_file(side), base, config, config.labels_of(name), **options)

    validation = pairs_of("validation", limit=settings.evaluate_pairs) if config.prepare.preferences else None
    training = TRAININGS[settings.kind].start(base, config, name)
    store = None if settings.is_trained else state_store(config, name, root)
    saved = store.load() if store else None
    if saved:
        training.updater.restore(saved.tensors, saved.values["updater"])
        if distributed.is_main():
            print(f"train_preference {name}: continues from step {saved.number}", file=sys.stderr, flush=True)
        done = Done(**saved.values["done"])
        saved = None  # its file is mapped, and takes room on the disk until this is gone
    else:
        name_of_it = "imported" if settings.is_trained else "start"
        done = Done(accuracy=_accuracies(training, validation, name_of_it, config))
    counts: dict[str, int] = {}
    if store:
        pairs = pairs_of("train")
        if settings.filter:
            file = workspace.prepared.pairs_file("train")
            pairs, counts = filter_pairs(
                pairs, file, settings.filter, config, base.device, cache=workspace.latents_cache
            )
        start -= done.seconds  # spent by earlier processes
        _train(training, pairs, config, store, done, tracker, start=start)
        done.accuracy += _accuracies(training, validation, "trained", config)
    candidates = _candidates(training, config, workspace)
    with distributed.written_by_main(atomic_path(workspace.preference_model(name))) as folder:
        training.save(folder)
    with distributed.written_by_main(atomic_path(workspace.train_preference(name))) as folder:
        folder.mkdir(exist_ok=True)
        write_csv(folder / "accuracy.csv", done.accuracy)
        write_csv(folder / "candidates.csv", candidates)
        write_csv(folder / "history.csv", done.history)
        metrics = {**_metrics(done, candidates), "skipped": training.skipped}
        metrics |= {"filter": counts} if counts else {}
        per_pair = settings.forwards_per_pair(config.counted_sampling)
        metrics["unet_forwards"] = round(done.step * settings.batch_size * per_pair)
        write_json(folder / "metrics.json", {**metrics, "seconds": round(time.perf_counter() - start, 1)})
    for row in done.accuracy:
        tracker.log_metrics({f"accuracy_{row['model']}": row["accuracy"]}, step=row["timestep"])
    for row in candidates:
        tracker.log_metrics({"candidate_agreement": row["agreement"]}, step=int(row["timestep"]))
    if store and distributed.is_main():
        store.clear()


@dataclass
class Done:
    """A training's progress and measurements, without its weights."""

    accuracy: list[dict[str, Any]]  # of the imported model, or of the start and later also of the trained one
    history: list[dict[str, float]] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0  # spent by all processes of the stage when the state was saved


def state_store(config: Config, name: str, root: Path) -> StateStore:
    """The store of the stage's states, with the settings and inputs that they depend on."""
    preference, labels = config.preference_models[name], config.labels_of(name)
    settings = config.model_dump(mode="json", include={"seed", "model", "sampling"})
    settings |= {"labels": labels.model_dump(mode="json"), "preference_model": preference.model_dump(mode="json")}
    inputs: dict[str, str | Path | None] = {
        "model": config.model.path,
        "vae": config.model.vae,
        **{key: source for key, (source, _) in preference.repositories().items()},
        "labels": labels.model,
    }
    workspace = Workspace(config, root)
    pairs = fingerprint_of_pairs(workspace.prepared.pairs_file("train"))
    settings |= {"inputs": {"pairs": pairs, **fingerprints(inputs)}}
    return StateStore(workspace.state("train_preference", name), settings)


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

    settings = training.config
    for past in done.history:
        _log(past, settings.log_every, tracker)
    saver = Saver(
        store if distributed.is_main() else None,
        config.safety.save_every_seconds,
        snapshot,
        total=settings.steps,
        resumed=done.step or None,
    )
    with (
        Progress[None](total=settings.steps, done=done.step, label="train_preference") as bar,
        memory_advice(settings.memory_remedy()),
        saver.saving_when_stopped(),
    ):
        for step in range(done.step, settings.steps):
            began = time.perf_counter()
            with saver.uninterruptible():
                row = training.step(pairs, step, seed=config.seed)
                done.step += 1
                done.history += [{"step": done.step, **row}] if row else []
            if row:
                bar.update(loss=row["loss"], accuracy=row["accuracy"])
                _log(done.history[-1], settings.log_every, tracker)
            if done.step % settings.log_every == 0:
                tracker.log_metrics({"step_seconds": time.perf_counter() - began}, step=done.step)
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
    for timestep in progress(training.config.evaluate_timesteps, label=f"accuracy of the {name} model"):
        accuracy, count = training.accuracy(pairs, timestep, seed=config.seed)
        rows.append({"timestep": timestep, "model": name, "accuracy": accuracy, "n": count})
    return rows


def _candidates(training: PreferenceTraining, config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Rows of spo.evaluation.candidate_agreement, if the profile asks for them."""
    settings = training.config.candidates
    if settings is None:
        return []
    prompts = workspace.prepared.prompts("validation", settings.num_prompts)
    return candidate_agreement(training.base, training.scorer(), prompts, settings, seed=config.seed)


def _metrics(done: Done, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy: dict[str, dict[str, float]] = {}
    for row in done.accuracy:
        accuracy.setdefault(row["model"], {})[f"t_{row['timestep']}"] = round(row["accuracy"], 4)
    found: dict[str, Any] = {"accuracy": accuracy}
    if candidates:
        found["candidate_agreement"] = {f"t_{row['timestep']:g}": round(row["agreement"], 4) for row in candidates}
    if tail := done.history[-50:]:
        found["loss"] = round(sum(row["loss"] for row in tail) / len(tail), 4)
    return {**found, "pairs": done.accuracy[0]["n"] if done.accuracy else 0, "steps": len(done.history)}
