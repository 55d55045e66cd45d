import errno
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.errors import TrainingError
from spo.runtime import checkpoint, distributed
from spo.runtime.checkpoint import State, StateStore, pack_optimizer, unpack_optimizer
from spo.runtime.hashing import file_checksum, fingerprint
from spo.runtime.stopping import Stopped, stoppable

MADE_BY = {"align": {"beta": 10.0, "lora": {"rank": 8}}, "prompts": "abc"}


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state", MADE_BY)


def state(number: int) -> State:
    return State(number, {"w": torch.full((300,), number / 3)}, {"history": [{"loss": number / 7}]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_what_is_loaded(store: StateStore) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": torch.arange(3)}
    tensors |= {"d": torch.tensor([True, False, True]), "e": torch.empty(0, 2), "f": torch.randn(3).half()}
    tensors |= {"g": torch.arange(5, dtype=torch.uint8), "h": torch.randn(2, dtype=torch.float64)}
    store.save(State(5, tensors, {"x": 1 / 3, "rows": [{"a": None}]}))
    loaded = store.load()
    assert loaded is not None
    assert (loaded.number, loaded.values) == (5, {"x": 1 / 3, "rows": [{"a": None}]})
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_the_checksums_are_those_of_the_files(store: StateStore) -> None:
    store.save(state(1))
    folder = store.folder / "00000001"
    checksums = json.loads((folder / "manifest.json").read_text())["checksums"]
    assert checksums == {name: file_checksum(folder / name) for name in ("tensors.safetensors", "values.json")}


def test_two_states_are_on_the_disk_at_most(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, write = [], checkpoint.write_tensors

    def writing(path: Path, tensors: Mapping[str, Tensor]) -> str:
        checksum = write(path, tensors)
        seen.append(len(list(store.folder.rglob("tensors.safetensors"))))
        return checksum

    monkeypatch.setattr(checkpoint, "write_tensors", writing)
    for number in range(1, 6):
        store.save(state(number))
    assert seen == [1, 2, 2, 2, 2]
    assert names(store.folder) == ["00000004", "00000005"]


def as_second_process(monkeypatch: pytest.MonkeyPatch, found: tuple[int | None, str]) -> None:
    """This process is the second of two; the first one has found this state, or refuses with this message."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [found, own])


def test_only_the_first_process_checks_the_states_and_the_others_read_the_one_it_found(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        store.save(state(number))
    as_second_process(monkeypatch, (1, ""))
    monkeypatch.setattr(checkpoint, "file_checksum", lambda path: pytest.fail(f"{path} is hashed"))
    loaded = store.load()
    assert loaded is not None and loaded.number == 1
    assert torch.equal(loaded.tensors["w"], state(1).tensors["w"])
    assert names(store.folder) == ["00000001", "00000002"]


def test_what_the_first_process_refuses_ends_all(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(state(1))
    as_second_process(monkeypatch, (None, "made by other settings"))
    with pytest.raises(TrainingError, match="made by other settings"):
        store.load()


def test_no_state_is_none(store: StateStore) -> None:
    assert store.load() is None


def test_the_last_two_are_kept_and_clear_removes_them(store: StateStore) -> None:
    for number in (8, 9, 10, 11):
        store.save(state(number))
    assert names(store.folder) == ["00000010", "00000011"]
    store.clear()
    assert store.load() is None


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _flip(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(bytes(data))

    return flip


FILES = ("tensors.safetensors", "values.json", "manifest.json")


@pytest.mark.parametrize(
    "damage",
    [
        *[_truncate(name) for name in FILES],
        *[_flip(name) for name in FILES[:2]],
        *[lambda folder, name=name: (folder / name).unlink() for name in FILES],
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"version": 99}'),
    ],
)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(
    store: StateStore, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(state(1))
    store.save(state(2))
    damage(store.folder / "00000002")
    loaded = store.load()
    assert loaded is not None and loaded.number == 1
    assert "00000002 is damaged and ignored" in capsys.readouterr().err
    assert names(store.folder) == ["00000001"]


def test_what_was_left_of_a_save_that_was_killed_is_swept_away(store: StateStore) -> None:
    store.save(state(1))
    (store.folder / ".00000002.host.12345.tmp").mkdir()
    assert store.load() is not None
    assert names(store.folder) == ["00000001"]


def test_where_all_are_damaged_the_run_starts_anew(store: StateStore) -> None:
    store.save(state(1))
    _truncate("tensors.safetensors")(store.folder / "00000001")
    assert store.load() is None


@pytest.mark.parametrize(
    ("made_by", "said"),
    [
        ({**MADE_BY, "prompts": "xyz"}, "prompts was abc, is xyz"),
        ({"align": {"beta": 5.0, "lora": {"rank": 8}}, "prompts": "abc"}, r"align\.beta was 10\.0, is 5\.0"),
        ({"align": {"beta": 10.0}, "prompts": "abc"}, r"align\.lora\.rank was 8, is None"),
        ({**MADE_BY, "seed": 1}, "seed was None, is 1"),
    ],
)
def test_another_configuration_is_refused_with_the_difference_and_the_mend(
    store: StateStore, made_by: dict[str, Any], said: str
) -> None:
    store.save(state(1))
    with pytest.raises(TrainingError, match=f"{said}.*--restart"):
        StateStore(store.folder, made_by).load()
    assert store.load() is not None


def test_a_full_disk_leaves_the_state_before_whole_and_says_so(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(state(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"state of 2 cannot be saved.*No space left.*the state of 1 is intact"):
        store.save(state(2))
    monkeypatch.undo()
    assert names(store.folder) == ["00000001"]
    loaded = store.load()
    assert loaded is not None and loaded.number == 1


def test_a_file_size_limit_of_the_system_is_one_line_too(store: StateStore) -> None:
    """RLIMIT_FSIZE makes the system itself refuse to write on, in the middle of the weights."""
    resource = pytest.importorskip("resource")
    store.save(state(1))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(TrainingError, match=r"state of 2 cannot be saved.*the state of 1 is intact"):
            store.save(State(2, {"w": torch.zeros(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(store.folder) == ["00000001"]


def test_a_signal_while_saving_waits_for_the_save(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.write_tensors

    def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
    with pytest.raises(Stopped), stoppable():
        store.save(state(1))
    assert names(store.folder) == ["00000001"]


class Nested(torch.optim.AdamW):
    """Its `state_dict` puts the tensors a level deeper, and one is shared by all parameters, as in bitsandbytes."""

    table = torch.ones(3)

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()
        for index, each in whole["state"].items():
            moments = {name: each[name] for name in ("exp_avg", "exp_avg_sq")}
            whole["state"][index] = {"step": each["step"], "moments": {**moments, "qmap1": self.table}}
        return whole


def weights_after(steps: int, *, interrupted: bool, kind: Any = torch.optim.AdamW) -> Tensor:
    """AdamW over a small problem; if interrupted, half-way a new optimiser takes over what the old one had."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = kind(layer.parameters(), lr=0.1)
    for step in range(steps):
        if interrupted and step == steps // 2:
            tensors, numbers = pack_optimizer(optimizer)
            optimizer = kind(layer.parameters(), lr=0.1)
            unpack_optimizer(optimizer, tensors, json.loads(json.dumps(numbers)))
        optimizer.zero_grad()
        layer(torch.ones(2, 4) * step).square().mean().backward()
        optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Nested])
def test_an_optimiser_that_is_put_back_goes_on_to_the_bit(kind: Any) -> None:
    assert torch.equal(weights_after(6, interrupted=True, kind=kind), weights_after(6, interrupted=False, kind=kind))


def test_a_table_that_parameters_share_can_be_saved(store: StateStore) -> None:
    layer = torch.nn.Linear(4, 4)
    optimizer = Nested(layer.parameters(), lr=0.1)
    layer(torch.ones(2, 4)).mean().backward()
    optimizer.step()
    tensors, numbers = pack_optimizer(optimizer)
    store.save(State(1, tensors, numbers))
    saved = store.load()
    assert saved is not None and saved.tensors.keys() == tensors.keys()
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in tensors.items())


def test_an_optimiser_that_is_put_back_has_memory_of_its_own() -> None:
    """So a state's file, which its tensors are mapped from, takes no room once it is removed."""
    parameters = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].sum().backward()
    optimizer.step()
    tensors, numbers = pack_optimizer(optimizer)
    other = torch.optim.AdamW(parameters)
    unpack_optimizer(other, tensors, numbers)
    given = {tensor.data_ptr() for tensor in tensors.values()}
    restored, _ = pack_optimizer(other)
    assert restored.keys() == tensors.keys()
    assert not given & {tensor.data_ptr() for tensor in restored.values()}


def test_a_fingerprint_tells_contents_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1" * 3_000_000)
    before, whole = fingerprint(tmp_path / "a" / "x"), fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "a" / "x") == before != whole
    with (tmp_path / "a" / "x").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"2")
    assert fingerprint(tmp_path / "a" / "x") != before
    assert fingerprint(tmp_path / "a") != whole
