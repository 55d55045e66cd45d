"""One stage's run, from its start in the journal to its end in the store."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spo.config import Config
from spo.tracking.facts import inputs, provenance, tags
from spo.tracking.heartbeat import Heartbeat
from spo.tracking.journal import Journal, unsent
from spo.tracking.sender import Sender, send_unsent
from spo.tracking.store import connect, is_temporary, pipeline_id, run_url, unusable
from spo.tracking.tracker import JournalTracker, NullTracker, Tracker

STOPPED_SECONDS = 5.0  # a stopped stage waits this long for a server that hangs, twice


@contextmanager
def start(
    config: Config, stage: str, root: Path = Path(), *, method: str | None = None, seed: int | None = None
) -> Iterator[Tracker]:
    """A tracker for one stage's run. The run is FAILED if the block raises or is interrupted.

    An unreachable server does not stop a stage: a later stage sends its journal. ConfigError if the store is unusable.
    """
    if int(os.environ.get("RANK", "0")):  # only the first process of a distributed run reports
        yield NullTracker()
        return
    client = connect(root)
    journal = Journal.create(unsent(root))
    tracker, sender = JournalTracker(journal), Sender(client, journal, root)
    journal.append(
        "start",
        experiment=experiment_name(config),
        pipeline=pipeline_id(),
        profile=config.profile,
        name=" ".join(part for part in (stage, method, None if seed is None else f"seed {seed}") if part),
        tags=tags(config, stage, root)
        | {key: str(value) for key, value in {"method": method, "seed": seed}.items() if value is not None},
        parent_tags=provenance(root),
        time=_now(),
    )
    if sender.send():
        print(f"tracked at {run_url(root, sender.state['experiment'], sender.state['parent'])}", flush=True)
        send_unsent(root)
    elif (problem := sender.problem) is not None and not is_temporary(root, problem):
        journal.remove()
        raise unusable(root, problem) from problem
    journal.append("inputs", inputs=inputs(config, stage, root))
    heartbeat = Heartbeat(tracker, sender)
    heartbeat.start()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        patience = STOPPED_SECONDS if isinstance(sys.exception(), KeyboardInterrupt) else None
        heartbeat.stop(patience)
        journal.append("end", status=status, time=_now())
        if sender.send_within(patience):
            journal.remove()
        else:
            journal.release()
            print(
                f"warning: not all of {stage} could be tracked; the rest is kept in {journal.folder} and sent when "
                "the next stage starts or by `python -m spo mlflow-ui`",
                file=sys.stderr,
                flush=True,
            )


def experiment_name(config: Config) -> str:
    return f"spo-{config.profile}"


def _now() -> int:
    return int(time.time() * 1000)
