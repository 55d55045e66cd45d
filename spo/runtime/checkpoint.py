"""The state of a training run on disk, from which a killed run continues with the same result.

    store = StateStore(folder, made_by={"align": ..., "prompts": fingerprint(path)})
    if state := store.load():
        ...
    store.save(state)  # spo.runtime.saver does this in the background

A state is a folder, named by the run's step or rollout, with tensors.safetensors, values.json and manifest.json, which
has the checksums of both. It is written under a temporary name and renamed, so a half-written state is never read. The
last two states are kept; the older one is removed before a third is written, so two of them need room. They are no
output of a stage, since DVC removes outputs before a stage runs.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spo.errors import TrainingError, one_line
from spo.runtime import distributed
from spo.runtime.files import atomic_path, read_json, write_json
from spo.runtime.hashing import file_checksum
from spo.runtime.stopping import uninterrupted
from spo.runtime.text import byte_size, flatten

VERSION = 2
KEPT = 2
DTYPES = {  # safetensors' names of what weights and optimizers hold
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """A run after `number` steps or rollouts: its tensors by name, and all other values as JSON can hold them."""

    number: int
    tensors: Mapping[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class StateStore:
    """The states of one run in `folder`, which holds nothing else.

    made_by: the settings and the fingerprints of the inputs that the run's result depends on.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any]):
        self.folder = folder
        self.made_by = json.loads(json.dumps(dict(made_by)))  # as when read from a file

    def load(self) -> State | None:
        """The newest undamaged state, or None; a damaged state is named on stderr and removed.

        With several processes, the first one checks the states, and the others read the one that it found.
        TrainingError if other settings or inputs made it.
        """
        state, refusal = None, ""
        if distributed.is_main():
            try:
                state = self._newest()
            except TrainingError as error:
                refusal = str(error)
        number, refusal = distributed.gather_objects((state.number if state else None, refusal))[0]
        if refusal:
            raise TrainingError(refusal)
        if state is None and number is not None:
            state, _ = _read(self._path(number), checked=True)
        return state

    def save(self, state: State) -> None:
        """Write a state and keep the last two; TrainingError if it cannot be written.

        The tensors must not change meanwhile. Those of a GPU are copied one at a time.
        """
        try:
            for path in self._paths()[: 1 - KEPT]:
                shutil.rmtree(path)
            with uninterrupted(), atomic_path(self._path(state.number)) as folder:
                folder.mkdir()
                checksums = {"tensors.safetensors": write_tensors(folder / "tensors.safetensors", state.tensors)}
                write_json(folder / "values.json", {"number": state.number, "values": state.values})
                checksums["values.json"] = file_checksum(folder / "values.json")
                write_json(
                    folder / "manifest.json", {"version": VERSION, "checksums": checksums, "made_by": self.made_by}
                )
        except (OSError, SafetensorError) as error:
            raise TrainingError(self._not_saved(error, state)) from None

    def clear(self) -> None:
        """Remove all states."""
        for path in self._paths():
            shutil.rmtree(path)
        self._sweep()

    def _newest(self) -> State | None:
        self._sweep()
        for path in reversed(self._paths()):
            try:
                state, made_by = _read(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                print(f"warning: the state {path} is damaged and ignored: {one_line(error)}", file=sys.stderr)
                shutil.rmtree(path, ignore_errors=True)
                continue
            if differences := _differences(made_by, self.made_by):
                raise TrainingError(
                    f"the state {path} was made by other settings: {'; '.join(differences)}; go back to those, or "
                    f"start anew: add --restart, or `rm -r {self.folder}`"
                )
            return state
        return None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _sweep(self) -> None:
        """Remove half-written states of a killed process; the stage's lock excludes running ones."""
        for path in self.folder.glob(".[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)

    def _paths(self) -> list[Path]:
        """The states' folders, the oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdecimal())

    def _not_saved(self, error: Exception, state: State) -> str:
        free = shutil.disk_usage(self.folder).free
        paths = self._paths()
        kept = f"the state of {int(paths[-1].name)} is intact" if paths else "there was none before it"
        return (
            f"the state of {state.number} cannot be saved in {self.folder}: {one_line(error)}; it takes "
            f"{byte_size(state.nbytes)}, {byte_size(free)} are free; {kept}: make room and run the same command again"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; the SHA-256 of its bytes, computed while they are written.

    The format: the length of the header in 8 bytes, the header as JSON, the tensors; as in the library those with the
    widest numbers first, so that each starts at a multiple of its numbers' width
    (https://huggingface.co/docs/safetensors).
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    entries, end = {}, 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    start_of_file = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(start_of_file)
    with ThreadPoolExecutor(max_workers=1) as hashing, path.open("wb") as file:
        file.write(start_of_file)
        for tensor in ordered.values():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            hashed = hashing.submit(digest.update, data)
            file.write(data)
            hashed.result()
    return digest.hexdigest()


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
    """Restore what `pack_optimizer` returned; the optimizer keeps its own settings.

    It shares no memory with the tensors: a file that is mapped takes room on the disk even after it is removed.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for restored in optimizer.state.values():
        for name, value in restored.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":  # torch keeps the tensors given to it
                restored[name] = value.clone()


def _read(path: Path, *, checked: bool = False) -> tuple[State, dict[str, Any]]:
    """A state, whose tensors are mapped from the file, and what made it; if `checked`, its checksums are not needed."""
    manifest = read_json(path / "manifest.json")
    if manifest["version"] != VERSION:
        raise ValueError(f"it is of version {manifest['version']}, not {VERSION}")
    for name in () if checked else ("tensors.safetensors", "values.json"):
        if file_checksum(path / name) != manifest["checksums"][name]:
            raise ValueError(f"the checksum of {name} differs")
    values = read_json(path / "values.json")
    return State(values["number"], load_file(path / "tensors.safetensors"), values["values"]), manifest["made_by"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each value that differs, with its dotted name."""
    one, other = flatten(before), flatten(now)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name} was {one.get(name)}, is {other.get(name)}" for name in names]
