"""The state of a training run on disk, from which a killed run continues with the same result.

    store = StateStore(folder, made_by={"align": ..., "prompts": fingerprint(path)})
    if state := store.load():
        ...
    saver = Saver(store, every_seconds, snapshot)
    with saver.saving_when_stopped():
        for step in ...:
            ...
            saver.save_if_due()

A state is a folder, named by the run's step or rollout, with tensors.safetensors, values.json and manifest.json, which
has the checksums of both. It is written under a temporary name and renamed, so a half-written state is never read. The
last two states are kept. They are no output of a stage, since DVC removes outputs before a stage runs.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.errors import TrainingError, one_line
from spo.runtime.files import atomic_path, read_json, write_json
from spo.runtime.hashing import file_checksum
from spo.runtime.stopping import uninterrupted
from spo.runtime.text import flatten

VERSION = 2
KEPT = 2
SHARE_OF_TIME = 0.05  # that saving may take, at most


@dataclass(frozen=True)
class State:
    """A run after `number` steps or rollouts: its tensors by name, and all other values as JSON can hold them."""

    number: int
    tensors: Mapping[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)


class StateStore:
    """The states of one run in `folder`, which holds nothing else.

    made_by: the settings and the fingerprints of the inputs that the run's result depends on.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any]):
        self.folder = folder
        self.made_by = json.loads(json.dumps(dict(made_by)))  # as when read from a file

    def load(self) -> State | None:
        """The newest undamaged state, or None; a damaged state is named on stderr and removed.

        TrainingError if other settings or inputs made it.
        """
        self._sweep()
        for path in reversed(self._paths()):
            try:
                state, made_by = _read(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                print(f"warning: the state {path} is damaged and ignored: {one_line(error)}", file=sys.stderr)
                shutil.rmtree(path, ignore_errors=True)  # another process of the run may have done so
                continue
            if differences := _differences(made_by, self.made_by):
                raise TrainingError(
                    f"the state {path} was made by other settings: {'; '.join(differences)}; go back to those, or "
                    f"start anew: add --restart, or `rm -r {self.folder}`"
                )
            return state
        return None

    def save(self, state: State) -> None:
        """Write a state and keep the last two; TrainingError if it cannot be written."""
        target = self.folder / f"{state.number:08d}"
        try:
            with uninterrupted(), atomic_path(target) as folder:
                folder.mkdir()
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
                save_file(tensors, folder / "tensors.safetensors")
                write_json(folder / "values.json", {"number": state.number, "values": state.values})
                checksums = {name: file_checksum(folder / name) for name in ("tensors.safetensors", "values.json")}
                write_json(
                    folder / "manifest.json", {"version": VERSION, "checksums": checksums, "made_by": self.made_by}
                )
            for path in self._paths()[:-KEPT]:
                shutil.rmtree(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(self._not_saved(error, state)) from None

    def clear(self) -> None:
        """Remove all states."""
        for path in self._paths():
            shutil.rmtree(path)
        self._sweep()

    def _sweep(self) -> None:
        """Remove half-written states of a killed process; the stage's lock excludes running ones."""
        for path in self.folder.glob(".[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)

    def _paths(self) -> list[Path]:
        """The states' folders, the oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdecimal())

    def _not_saved(self, error: Exception, state: State) -> str:
        size = sum(tensor.nbytes for tensor in state.tensors.values())
        free = shutil.disk_usage(self.folder).free
        paths = self._paths()
        kept = f"the state of {int(paths[-1].name)} is intact" if paths else "there was none before it"
        return (
            f"the state of {state.number} cannot be saved in {self.folder}: {one_line(error)}; it takes "
            f"{size / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; {kept}: make room and run the same command again"
        )


class Saver:
    """Saves a run at intervals, and once more when it is stopped.

    snapshot returns the state to continue from. Saving takes at most a twentieth of the run's time. Without a store
    nothing is saved.
    """

    def __init__(self, store: StateStore | None, every_seconds: float, snapshot: Callable[[], State]):
        self._store = store
        self._every = every_seconds
        self._snapshot = snapshot
        self._held: State | None = None
        self._half_done = False
        self._saved: int | None = None
        self._last = time.monotonic()
        self._took = 0.0

    def save_if_due(self) -> None:
        """Save if the last save is long enough ago."""
        if self._store and time.monotonic() - self._last >= max(self._every, self._took / SHARE_OF_TIME):
            self.save()

    def save(self) -> None:
        """Save now, unless this state was saved last or an uninterruptible block has failed."""
        if self._store is None or self._half_done:
            return
        start = time.monotonic()
        state = self._held or self._snapshot()
        if state.number != self._saved:
            self._store.save(state)
            self._saved = state.number
        self._last = time.monotonic()
        self._took = self._last - start

    @contextmanager
    def rollback_on_stop(self) -> Iterator[None]:
        """If the block is stopped, save the state from before the block."""
        self._held = self._snapshot() if self._store else None
        yield
        self._held = None

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Delay signals until the block ends; if an error ends it, save nothing."""
        with uninterrupted():
            self._half_done = True
            yield
            self._half_done = False

    @contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """Save when a signal ends the block."""
        try:
            yield
        except KeyboardInterrupt:
            with uninterrupted():
                self.save()
                if self._store is not None and self._saved is not None:
                    where = f"at {self._saved}, saved in {self._store.folder}"
                    print(f"stopped {where}; the same command continues from there", file=sys.stderr, flush=True)
            raise


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: named tensors, and the values that are no tensors."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in _flat(values).items():
            kind: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
            kind[f"optimizer.{index}.{name}"] = value
    return tensors, numbers


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state as bitsandbytes also takes it: its own `state_dict` puts the 8-bit tensors a level deeper.

    Its tables (qmap1, qmap2) are one tensor for all parameters; they are copied, since a file cannot share tensors.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name: value.clone() if name.startswith("qmap") else value for name, value in flat.items()}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Restore what `pack_optimizer` returned; the optimizer keeps its own settings."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    manifest = read_json(path / "manifest.json")
    if manifest["version"] != VERSION:
        raise ValueError(f"it is of version {manifest['version']}, not {VERSION}")
    for name in ("tensors.safetensors", "values.json"):
        if file_checksum(path / name) != manifest["checksums"][name]:
            raise ValueError(f"the checksum of {name} differs")
    values = read_json(path / "values.json")
    return State(values["number"], load_file(path / "tensors.safetensors"), values["values"]), manifest["made_by"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each value that differs, with its dotted name."""
    one, other = flatten(before), flatten(now)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name} was {one.get(name)}, is {other.get(name)}" for name in names]
