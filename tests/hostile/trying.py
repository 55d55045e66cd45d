"""What the tests of hostile input share; `SPO_EXAMPLES=20 pytest tests/hostile` tries twenty times as many inputs."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("SPO_EXAMPLES", "1"))

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def tries(count: int) -> Callable[[Any], Any]:
    """Try `count` examples, the same ones each time unless more are asked for."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def assert_one_line(error: BaseException, limit: int = 2000) -> None:
    """What a user may be shown."""
    message = str(error)
    assert message and "\n" not in message and len(message) < limit, message


@st.composite
def damaged(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of an original, cut, overwritten, doubled or with something put in."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["cut", "flip", "insert", "repeat", "zero"])):
            case "cut":
                del data[at:]
            case "flip":
                for i in range(at, min(len(data), at + draw(st.integers(1, 4)))):
                    data[i] ^= draw(st.integers(1, 255))
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "zero":
                data[at : at + 8] = bytes(len(data[at : at + 8]))
    return bytes(data)
