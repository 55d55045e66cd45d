import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spo.errors import LockedError
from spo.runtime.locking import locked

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys; from pathlib import Path; from spo.runtime.locking import locked\n"
    "with locked(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"
)


def test_a_second_process_is_refused_and_told_who_has_it_and_a_kill_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "align.lock"
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert held.stdin and held.stdout
    with held:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"^align spo is running already: process {held.pid} on .* since 20"):
            with locked(path, "align spo"):
                pass
        with locked(path.with_name("other.lock"), "another profile's"):
            pass
        held.send_signal(signal.SIGKILL)
        held.wait()
        with locked(path, "align spo"):
            assert path.with_name("align.lock.txt").read_text().startswith(f"process {os.getpid()} on ")
    assert [item.name for item in path.parent.iterdir() if item.suffix == ".txt"] == []
