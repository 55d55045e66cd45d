"""Sends a run's journal to MLflow: in order, each event once, and later where the store is unreachable."""

import json
import sys
import threading
import time
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.tracking.journal import Event, Journal, unsent
from spo.tracking.store import connect, find_run, made, masked_line, refused

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_PER_SEND = 1000  # MLflow's limits
PARAMS_PER_SEND = 100


class Sender:
    """Sends one journal; safe to call from several threads."""

    def __init__(self, client: "MlflowClient", journal: Journal, root: Path):
        self.client = client
        self.journal = journal
        self.root = root
        self.state: Event = journal.state()
        self.problem: Exception | None = None  # why the store is away, as far as known
        self._complained: set[str] = set()
        self._sending = threading.Lock()

    @property
    def run_id(self) -> str | None:
        return self.state.get("run_id")

    def send(self) -> bool:
        """Send new events; returns whether all have arrived. A problem of the store is reported once."""
        with self._sending:
            try:
                self._send()
                self.problem = None
            except Exception as error:
                if not _is_the_store_s(error):
                    raise
                self.problem = error
                self._say(
                    "away",
                    f"the tracking store is away ({masked_line(error)}); what is reported is kept in "
                    f"{self.journal.folder} and sent when it is back",
                )
            return self.problem is None

    def send_within(self, seconds: float | None) -> bool:
        """Send, but wait at most `seconds` for a server that hangs; None: wait for ever."""
        if seconds is None:
            return self.send()
        arrived: list[bool] = []
        thread = threading.Thread(target=lambda: arrived.append(self.send()), name="tracking's end", daemon=True)
        thread.start()
        thread.join(seconds)
        return arrived == [True]

    def _send(self) -> None:
        """Send events in order, neighbouring metrics together, and note the offset after each."""
        from mlflow.entities import Metric

        events = list(self.journal.after(self.state["offset"]))
        while events:
            together = list(takewhile(lambda pair: pair[0]["do"] == "metrics", events))
            rows = [Metric(*row) for event, _ in together for row in event["rows"]]
            for start in range(0, len(rows), METRICS_PER_SEND):
                batch = rows[start : start + METRICS_PER_SEND]
                self._accepted(lambda batch=batch: self.client.log_batch(self.state["run_id"], metrics=batch))
            if not together:
                together = events[:1]
                self._one(together[0][0])
            self.state["offset"] = together[-1][1]
            self.journal.note(self.state)
            events = events[len(together) :]

    def _one(self, event: Event) -> None:
        match event["do"]:
            case "start":
                self._start(event)
            case "params":
                self._params(event["params"])
            case "file":
                path = self.journal.folder / event["path"]
                upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
                folder = "/".join(filter(None, (event["folder"], path.name if path.is_dir() else None))) or None
                self._accepted(lambda: upload(self.state["run_id"], str(path), folder))
            case "inputs":
                read = [_input(each) for each in event["inputs"]]
                self._accepted(lambda: self.client.log_inputs(self.state["run_id"], read))
            case "end":
                for run_id in (self.run_id, self.state["parent"]):  # a parent run is as its latest stage
                    self._accepted(
                        lambda run_id=run_id: self.client.set_terminated(run_id, event["status"], event["time"])
                    )

    def _start(self, event: Event) -> None:
        """Make the run under its parent, unless an earlier attempt made it before its answer was lost."""
        experiment, parent = made(self.client, self.root, event["experiment"], event["pipeline"], event["profile"])
        run_id = find_run(self.client, experiment, "spo.journal", self.journal.id)
        if run_id is None:
            tags = {"mlflow.parentRunId": parent, "spo.journal": self.journal.id, **event["tags"]}
            run = self.client.create_run(experiment, start_time=event["time"], tags=tags, run_name=event["name"])
            run_id = run.info.run_id
        self.client.update_run(parent, status="RUNNING")
        for name, value in event["parent_tags"].items():
            self.client.set_tag(parent, name, value)
        self.state |= {"run_id": run_id, "parent": parent, "experiment": experiment}

    def _params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        rows = [Param(name, value) for name, value in params.items()]
        for start in range(0, len(rows), PARAMS_PER_SEND):
            batch = rows[start : start + PARAMS_PER_SEND]
            self._accepted(lambda batch=batch: self.client.log_batch(self.state["run_id"], params=batch))

    def _accepted(self, call: Any) -> None:
        """Call the store; an event that it refuses is dropped with a warning."""
        try:
            call()
        except Exception as error:
            if not (_is_the_store_s(error) and refused(error)):
                raise
            self._say("refused", f"tracking lost something: {masked_line(error)}")

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._complained:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self._complained.add(kind)


def send_unsent(root: Path = Path()) -> int:
    """Send the journals of processes that have ended; returns how many remain.

    A run whose process was killed ends as KILLED. A damaged journal is named and left.
    """
    client = connect(root)
    left = damaged = 0
    for journal in Journal.left_behind(unsent(root)):
        try:
            sent = not left and _send_whole(client, journal, root)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged += 1
            print(
                f"warning: {journal.folder} cannot be sent: {masked_line(error)}; remove it if it is not needed",
                file=sys.stderr,
                flush=True,
            )
            continue
        if sent:
            journal.remove()
        else:
            left += 1
    return left + damaged


def _send_whole(client: "MlflowClient", journal: Journal, root: Path) -> bool:
    """Whether all of an ended process's journal has arrived."""
    events = [event for event, _ in journal.after(0)]
    if events and events[0]["do"] == "start" and not any(event["do"] == "end" for event in events):
        journal.append("end", status="KILLED", time=int(time.time() * 1000))
    return Sender(client, journal, root).send()


def _is_the_store_s(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException | OSError)


def _input(values: dict[str, Any]) -> Any:
    """A data set as MLflow knows it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": values["source"]}), json.dumps(values["profile"])
    dataset = Dataset(values["name"], values["digest"], "local", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", values["context"])])
