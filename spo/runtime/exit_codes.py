"""How a command ends: an error's line on stderr, and the exit code."""

import sys
from collections.abc import Callable

from safetensors import SafetensorError

from spo.errors import SpoError, is_disk_full, is_out_of_memory, one_line
from spo.runtime.stopping import Stopped, stoppable, uninterrupted


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; signals can stop it.

    A user's mistake, a full disk or memory and an unusable path are one line and 1, Ctrl-C is 130, SIGTERM is 143. Any
    other error is ours and is raised.
    """
    try:
        with stoppable():
            code = command() or 0
            with uninterrupted():
                return code  # unless Python dropped a signal, which is then raised
    except SpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        if (remedy := _remedy(error)) is None:
            raise
        print(f"error: {one_line(error)}; {remedy}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        if error.encoding in ("utf-8", "utf_8"):
            raise
        text = ascii(error.object[error.start : error.end])
        print(f"error: this terminal's {error.encoding} has no {text}; set PYTHONUTF8=1", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"ended by {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _remedy(error: Exception) -> str | None:
    """What the user can do about an error of the machine; None for other errors."""
    if is_disk_full(error):
        return "make room and run the same command again; the half-written file has been removed"
    if is_out_of_memory(error):
        return "use a smaller batch or resolution, or a smaller model; `python -m spo check` measures its memory"
    if isinstance(error, OSError) and error.filename is not None:
        return "make this path readable and writable, and run the same command again"
    return None
