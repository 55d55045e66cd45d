"""Published weights of metrics, from a local file or the hub. Only tensors are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from spo.config.metrics import split_hub_file
from spo.core.precision import all_finite
from spo.errors import ModelError, one_line
from spo.runtime import hub
from spo.runtime.progress import tell_loading


def fetch_file(source: str) -> Path:
    """The path of a local file, or of OWNER/NAME/FILE on the hub; ModelError if it is neither."""
    path = Path(source)
    if path.is_file():
        return path
    on_hub = split_hub_file(source)
    if on_hub is None:
        raise ModelError(f"{source} is no file here; put one there, or name one on the hub as OWNER/NAME/FILE")
    hub.connect()
    repository, file = on_hub
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source} is no file here and cannot be fetched from the hub: {one_line(error, 160)}; without a network, "
            f"run `hf download {repository} {file} --local-dir models/{repository.split('/')[1]}` elsewhere, copy it "
            "here and name it instead"
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, or of its entry `state_dict`; ModelError if it holds none.

    No code of a pickled file runs.
    """
    tell_loading(f"the weights {path}", [path])
    try:
        values: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        )
    except Exception as error:  # torch's reader raises many kinds of errors for a damaged pickle
        raise ModelError(f"{path} cannot be read as tensors only: {one_line(error, 160)}; download it again") from None
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    named = values.items() if isinstance(values, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no named tensors; give the published file")
    unusable = [name for name, value in tensors.items() if not _usable(value)]
    if unusable:
        raise ModelError(f"{path} has no usable numbers in {one_line(unusable[0], 100)}; give the published file")
    return {name.removeprefix("module."): value.float() for name, value in tensors.items()}


def _usable(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_complex() and all_finite(value)


def fill(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Give the module the tensors of `state` and freeze it; ModelError if one is missing, unknown or of another shape.

    The module's own weights may be on the meta device.
    """
    try:
        module.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        raise ModelError(f"{source} does not fit a {type(module).__name__}: {one_line(error, 200)}") from None
    module.eval().requires_grad_(False)


def linear_head(state: Mapping[str, Tensor], prefix: str, source: object) -> nn.Sequential:
    """Linear layers in sequence, with the names of the state: `<prefix>0.weight`, `<prefix>2.weight`, ...

    The published heads have only dropout between them. ModelError if there are no layers or they do not chain.
    """
    fields = ("weight", "bias")
    names = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    order = sorted(names, key=int) if all(name.isdecimal() for name in names) else []
    if not order or not all(f"{prefix}{name}.{field}" in state for name in order for field in fields):
        raise ModelError(f"{source} has no layers {prefix}0, ...; give the published file")
    shapes = [tuple(state[f"{prefix}{name}.weight"].shape) for name in order]
    chained = all(len(shape) == 2 and all(shape) for shape in shapes) and shapes[-1][0] == 1
    if not chained or any(shapes[i][0] != shapes[i + 1][1] for i in range(len(shapes) - 1)):
        raise ModelError(
            f"{source}: layers {prefix}* of shapes {shapes} do not end in a score; give the published file"
        )
    head = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in shapes))
    fill(head, {f"{i}.{f}": state[f"{prefix}{name}.{f}"] for i, name in enumerate(order) for f in fields}, source)
    return head
