import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spo.runtime.exit_codes import exit_code
from spo.runtime.processes import run_group
from spo.runtime.stopping import SIGNALS, Stopped, stoppable, uninterrupted


@pytest.fixture(autouse=True)
def none_ignored() -> Iterator[None]:
    """The handlers of a process that nobody started by nohup or in the background, where some signals are ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_raises_and_knows_its_exit_code(number: signal.Signals, code: int) -> None:
    with pytest.raises(Stopped, match=number.name) as raised, stoppable():
        send(number)
    assert raised.value.exit_code == code


def test_a_signal_waits_for_the_end_of_what_must_not_be_interrupted() -> None:
    done = []
    with pytest.raises(Stopped), stoppable():
        with uninterrupted():
            with uninterrupted():
                send(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]


def test_an_error_within_wins_over_a_signal() -> None:
    with pytest.raises(ZeroDivisionError), stoppable(), uninterrupted():
        send(signal.SIGTERM)
        raise ZeroDivisionError


def test_it_is_no_exception_that_a_library_swallows() -> None:
    with pytest.raises(Stopped), stoppable():
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_came_in_a_destructor_ends_the_run_all_the_same() -> None:
    class Object:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    done = []
    with pytest.raises(Stopped), stoppable():
        Object()
        done.append("dropped")
        with uninterrupted():
            done.append("step")
        done.append("after")
    assert done == ["dropped", "step"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_came_in_a_last_destructor_is_still_the_commands_end() -> None:
    class Object:
        def __del__(self) -> None:
            send(signal.SIGINT)

    assert exit_code(lambda: print(Object() is None)) == 130
    assert exit_code(lambda: None) == 0


def test_what_is_saved_because_of_a_signal_is_not_ended_by_it_again() -> None:
    done = []
    with pytest.raises(Stopped), stoppable():
        try:
            send(signal.SIGTERM)
        except Stopped:
            for name in ("state", "tracker"):
                with uninterrupted():
                    done.append(name)
            raise
    assert done == ["state", "tracker"]


def test_a_signal_of_one_command_does_not_end_the_next() -> None:
    with pytest.raises(Stopped), stoppable():
        send(signal.SIGTERM)
    with stoppable(), uninterrupted():
        pass


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_it_does_nothing() -> None:
    errors = []

    def run() -> None:
        try:
            with stoppable(), uninterrupted():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def test_a_signal_ends_the_main_thread_while_another_one_writes() -> None:
    writing, over = threading.Event(), threading.Event()
    done = []

    def write() -> None:
        with uninterrupted():
            writing.set()
            over.wait()
        done.append("written")

    thread = threading.Thread(target=write)
    with pytest.raises(Stopped), stoppable():
        thread.start()
        writing.wait()
        send(signal.SIGTERM)
    over.set()
    thread.join()
    assert done == ["written"]


def test_a_command_ends_with_its_exit_code() -> None:
    assert run_group(["sh", "-c", "exit 3"], os.environ) == 3


def test_a_signal_reaches_a_commands_children_and_waits_for_them(tmp_path: Path) -> None:
    """As under DVC: the command ends at once, its child saves first."""
    child = "trap 'sleep 0.3; touch saved; exit' TERM; touch ready; while :; do sleep 0.05; done"
    command = ["sh", "-c", f'sh -c "{child}" & wait']

    def stop_when_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        send(signal.SIGTERM)

    thread = threading.Thread(target=stop_when_ready)
    with contextlib.chdir(tmp_path), pytest.raises(Stopped, match="SIGTERM"), stoppable():
        thread.start()
        run_group(command, os.environ)
    thread.join()
    assert (tmp_path / "saved").exists()
