"""What all tests share."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

for name, value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",  # the models are too small for more, and `make test` runs several processes
    "OMP_WAIT_POLICY": "PASSIVE",  # with more threads than cores, spinning takes most of the time
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)
for name in ("MLFLOW_TRACKING_URI", "SPO_PIPELINE_RUN", "RANK"):  # a developer's own must not reach the tests
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started with & by a script; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402  (reads OMP_NUM_THREADS as it is imported)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if hasattr(config, "workerinput"):  # under `pytest -n`: what takes long starts first
        slow = Counter(_group(item.nodeid) for item in items if "slow" in item.keywords)
        size = Counter(_group(item.nodeid) for item in items)
        items.sort(key=lambda item: (_group(item.nodeid) != PREFECT, *(-n[_group(item.nodeid)] for n in (slow, size))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `pytest -n`: a group of tests runs in one process, so that what they share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


PREFECT = "tests/flows/"
RAN = {"tests/delivery/test_remotes.py", "tests/delivery/test_shown.py"}


def _group(nodeid: str) -> str:
    """A file's tests are a group; so are all that run flows against the one server of tests/flows/conftest.py, and all
    that look at the one run of tests/delivery/conftest.py."""
    file = nodeid.partition("::")[0]
    if file in RAN:
        return min(RAN)
    return PREFECT if file.startswith(PREFECT) else file


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from the same global random state, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
