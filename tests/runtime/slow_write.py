"""A small training whose state of step 3 is never written to its end, for test_saver.py to kill.

python -m tests.runtime.slow_write FOLDER
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spo.runtime import checkpoint
from spo.runtime.checkpoint import State, StateStore, pack_optimizer, unpack_optimizer
from spo.runtime.saver import Saver
from spo.runtime.stopping import stoppable


def train(store: StateStore | None, *, steps: int = 8) -> dict[str, Tensor]:
    """AdamW on a small problem, from the newest state of the store, with a save after each step; the weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    done = 0

    def snapshot() -> State:
        tensors, numbers = pack_optimizer(optimizer)
        return State(done, {**tensors, **{name: each.detach() for name, each in layer.named_parameters()}}, numbers)

    if store and (saved := store.load()):
        done = saved.number
        layer.load_state_dict({name: saved.tensors[name] for name in layer.state_dict()})
        unpack_optimizer(optimizer, saved.tensors, saved.values)
    saver = Saver(store, 0, snapshot, total=steps, resumed=done or None)
    with saver.saving_when_stopped():
        for step in range(done, steps):
            with saver.uninterruptible():
                optimizer.zero_grad()
                layer(torch.ones(2, 4) * step).square().mean().backward()
                optimizer.step()
                done += 1
            saver.save()
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def store_in(folder: Path) -> StateStore:
    return StateStore(folder, {"steps": 8})


if __name__ == "__main__":
    write = checkpoint.write_tensors

    def half(path: Path, tensors: Mapping[str, Tensor]) -> str:
        checksum = write(path, tensors)
        if ".00000003." in str(path):
            path.write_bytes(path.read_bytes()[:100])
            print("half written", file=sys.stderr, flush=True)
            time.sleep(1000)
        return checksum

    checkpoint.write_tensors = half
    with stoppable():
        train(store_in(Path(sys.argv[1])))
