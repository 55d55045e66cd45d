import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import pytest
import torch

from spo.errors import TrainingError
from spo.runtime import saver as module
from spo.runtime.checkpoint import State, StateStore
from spo.runtime.saver import Saver
from spo.runtime.stopping import Stopped, stoppable
from tests.runtime.slow_write import store_in, train

ROOT = Path(__file__).parents[2]


class GatedStore(StateStore):
    """Tells when it begins to write a state, and writes it when `gate` lets it pass."""

    def __init__(self, folder: Path):
        super().__init__(folder, {})
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def save(self, state: State) -> None:
        self.begun.release()
        self.gate.acquire()
        super().save(state)


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state", {})


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[GatedStore]:
    store = GatedStore(tmp_path / "state")
    yield store
    store.gate.release(100)


def state(number: int) -> State:
    return State(number, {"w": torch.full((300,), number / 3)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(state: State) -> None:
    raise TrainingError(f"the state of {state.number} cannot be saved")


class Run:
    """Weights that count steps, and a saver that saves whenever it may."""

    def __init__(self, store: StateStore | None):
        self.number, self.weights = 0, torch.zeros(300)
        self.saver = Saver(store, 0, lambda: State(self.number, {"w": self.weights}), total=10)

    def step(self) -> None:
        self.number += 1
        self.weights += 1


def test_training_goes_on_while_a_state_is_written_and_does_not_change_it(gated: GatedStore) -> None:
    run = Run(gated)
    run.step()
    run.saver.save()
    run.step()
    gated.gate.release()
    run.saver.wait()
    loaded = gated.load()
    assert loaded is not None and loaded.number == 1
    assert torch.equal(loaded.tensors["w"], torch.ones(300))


def test_while_a_state_is_written_no_other_is_due(gated: GatedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE_OF_TIME", float("inf"))
    run = Run(gated)
    for _ in range(3):
        run.step()
        run.saver.save_if_due()
    gated.gate.release(2)
    run.saver.wait()
    assert names(gated.folder) == ["00000001"]
    run.saver.save_if_due()
    run.saver.wait()
    assert names(gated.folder) == ["00000001", "00000003"]


@pytest.mark.parametrize("saves", [1, 2])  # at the end, or by the next save
def test_what_the_writing_thread_could_not_do_is_raised(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    monkeypatch.setattr(store, "save", full)
    run, done = Run(store), []
    with pytest.raises(TrainingError, match="the state of 0 cannot be saved"), run.saver.saving_when_stopped():
        for number in range(saves):
            run.saver.save()
            run.step()
            done.append(number)
    assert done == [0]


def test_an_error_of_the_training_wins_over_one_of_the_writing_thread(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "save", full)
    run = Run(store)
    with pytest.raises(ZeroDivisionError), run.saver.saving_when_stopped():
        run.saver.save()
        raise ZeroDivisionError


def test_the_last_write_is_completed_before_the_training_ends(gated: GatedStore) -> None:
    run = Run(gated)
    with run.saver.saving_when_stopped():
        run.saver.save()
        gated.begun.acquire()
        gated.gate.release()
    assert names(gated.folder) == ["00000000"]


def test_a_stop_while_a_state_is_written_completes_it_and_writes_no_other(
    gated: GatedStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wait, run = module.wait, Run(gated)

    def open_the_gate(writes: list[Future[float]]) -> None:
        gated.gate.release()
        wait(writes)

    monkeypatch.setattr(module, "wait", open_the_gate)
    with pytest.raises(Stopped), stoppable(), run.saver.saving_when_stopped():
        run.step()
        run.saver.save()
        gated.begun.acquire()
        run.step()
        os.kill(os.getpid(), signal.SIGTERM)
    assert names(gated.folder) == ["00000001"]
    said = capsys.readouterr().err
    assert "stopping: completing the save of step 1" in said
    assert f"stopped at step 1 of 10, saved in {gated.folder}" in said


def test_a_stop_while_nothing_is_written_saves_how_things_stand_and_tells_where(
    store: StateStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(store)
    with pytest.raises(Stopped), stoppable(), run.saver.saving_when_stopped():
        run.step()
        run.saver.save()
        write = run.saver._writing
        assert write is not None
        wait([write])  # it has ended, and the saver has not seen it
        run.step()
        os.kill(os.getpid(), signal.SIGTERM)
    assert names(store.folder) == ["00000001", "00000002"]
    said = capsys.readouterr().err
    assert "stopped at step 2 of 10, saved in" in said
    assert "the same command continues from there" in said


def test_a_stop_writes_a_state_that_was_saved_last_no_second_time(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(store)
    with pytest.raises(Stopped), stoppable(), run.saver.saving_when_stopped():
        run.step()
        run.saver.save()
        run.saver.wait()
        monkeypatch.setattr(store, "save", lambda state: pytest.fail("it is written again"))
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_tells_what_it_writes_and_how_much_is_left(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gigabyte that takes a second is not made here; the clock and the size are told."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(State, "nbytes", 15_700_000_000)

    def twelve_seconds(state: State) -> None:
        now[0] += 12.0

    monkeypatch.setattr(store, "save", twelve_seconds)
    run = Run(store)
    with pytest.raises(Stopped), stoppable(), run.saver.saving_when_stopped():
        for _ in range(4):
            now[0] += 60.0
            run.step()
        run.saver.save()
        run.saver.wait()
        now[0] += 60.0 - 12.0
        run.step()
        os.kill(os.getpid(), signal.SIGTERM)
    said = capsys.readouterr().err
    assert "stopping: saving step 5, 15.7 GB, about 12 s" in said
    assert re.search(r"stopped at step 5 of 10, .*; 5 steps left, about 5 min; the same command", said)


def test_what_is_half_done_is_not_saved(store: StateStore) -> None:
    saver = Run(store).saver
    with pytest.raises(KeyboardInterrupt), saver.saving_when_stopped(), saver.uninterruptible():
        raise KeyboardInterrupt
    assert store.load() is None


def test_what_is_held_stays_as_it_was(store: StateStore) -> None:
    run = Run(store)
    held = run.saver.hold(State(0, {"w": run.weights}))
    run.step()
    run.saver.save()  # has memory of its own
    run.saver.wait()
    assert torch.equal(held.tensors["w"], torch.zeros(300))


def test_a_run_without_a_store_saves_nothing_and_copies_nothing() -> None:
    run = Run(None)
    live = State(0, {"w": run.weights})
    assert run.saver.hold(live) is live
    with pytest.raises(KeyboardInterrupt), run.saver.saving_when_stopped():
        run.saver.save_if_due()
        run.saver.save()
        raise KeyboardInterrupt


def test_an_error_saves_nothing(store: StateStore) -> None:
    with pytest.raises(ZeroDivisionError), Run(store).saver.saving_when_stopped():
        raise ZeroDivisionError
    assert not store.folder.exists()


def test_saving_takes_a_twentieth_of_the_time_at_most(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    saved = []

    def save(state: State) -> None:
        now[0] += 5.0
        saved.append(state.number)

    monkeypatch.setattr(store, "save", save)
    run = Run(store)
    for _ in range(400):
        now[0] += 1.0
        run.step()
        run.saver.save_if_due()
        run.saver.wait()
    assert len(saved) * 5.0 <= 0.06 * now[0]
    assert len(saved) >= 3


def test_a_run_that_is_killed_in_the_middle_of_a_write_after_a_stop_continues_to_the_same_weights(
    tmp_path: Path,
) -> None:
    """The grace is over before the write is: the state before it is whole."""
    command = [sys.executable, "-m", "tests.runtime.slow_write", str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env=environment) as run:
        assert run.stderr is not None
        assert run.stderr.readline() == b"half written\n"
        run.send_signal(signal.SIGTERM)
        assert run.stderr.readline().startswith(b"stopping: completing the save of step 3")
        run.kill()
    store = store_in(tmp_path / "cut")
    found = store.load()
    assert found is not None and found.number == 2
    assert names(store.folder) == ["00000002"]
    resumed, whole = train(store), train(store_in(tmp_path / "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_run_that_is_stopped_while_a_state_is_written_continues_to_the_same_weights(tmp_path: Path) -> None:
    store = GatedStore(tmp_path / "cut")

    def stop() -> None:
        for _ in range(2):
            store.begun.acquire()
            store.gate.release()
        store.begun.acquire()
        os.kill(os.getpid(), signal.SIGTERM)
        store.gate.release(100)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped), stoppable():
        train(store)
    thread.join()
    found = store.load()
    assert found is not None and found.number in (3, 4)  # 4: the signal found the write at its end
    resumed, whole = train(store), train(None)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
