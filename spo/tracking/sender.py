"""Sends a run's journal to MLflow: in order, each event once. If the store is unreachable, a later call sends it."""

import json
import sys
import threading
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.tracking import tracker
from spo.tracking.journal import Event, Journal, unsent
from spo.tracking.store import connect, find_run, make_parent_run, masked_line, refused

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH_SIZES = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits


class Sender:
    """Sends one journal; safe to call from several threads."""

    def __init__(self, client: "MlflowClient", journal: Journal, root: Path):
        self.client = client
        self.journal = journal
        self.root = root
        self.state: Event = journal.state()
        self.problem: Exception | None = None  # of the last `send`, if the store was unreachable
        self._warned: set[str] = set()
        self._sending = threading.Lock()

    def send(self) -> bool:
        """Send new events; returns whether all have arrived. A problem of the store is reported once."""
        with self._sending:
            try:
                self._send()
                self.problem = None
            except Exception as error:
                if not _is_store_error(error):
                    raise
                self.problem = error
                self._warn(
                    "away",
                    f"the tracking store is away ({masked_line(error)}); what is reported is kept in "
                    f"{self.journal.folder} and sent when it is back",
                )
            return self.problem is None

    def send_within(self, seconds: float | None) -> bool:
        """Send, but wait at most `seconds` for a server that hangs; None: without a limit."""
        if seconds is None:
            return self.send()
        arrived: list[bool] = []
        thread = threading.Thread(target=lambda: arrived.append(self.send()), name="tracking's end", daemon=True)
        thread.start()
        thread.join(seconds)
        return arrived == [True]

    def _send(self) -> None:
        """Send events in order, neighbouring metrics together, and store the offset after each."""
        from mlflow.entities import Metric

        events = list(self.journal.after(self.state["offset"]))
        while events:
            first = events[0][0]
            together = _together(events)
            if first["do"] == "metrics":
                self._log_batches(first, "metrics", [Metric(*row) for event, _ in together for row in event["rows"]])
            else:
                self._send_one(first)
            self.state["offset"] = together[-1][1]
            self.journal.note(self.state)
            events = events[len(together) :]

    def _send_one(self, event: Event) -> None:
        from mlflow.entities import Param, RunTag

        match event["do"]:
            case "start":
                self._start(event)
            case "params":
                self._log_batches(event, "params", [Param(name, value) for name, value in event["params"].items()])
            case "tags":
                self._log_batches(event, "tags", [RunTag(name, value) for name, value in event["tags"].items()])
            case "result":
                run_id = self._make_run(event["of"], event["of"], event)
                self.state["results"] = {**self.state.get("results", {}), event["of"]: run_id}
            case "file":
                path = self.journal.folder / event["path"]
                upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
                folder = "/".join(filter(None, (event["folder"], path.name if path.is_dir() else None))) or None
                self._call(upload, self._run_of(event), str(path), folder)
            case "inputs":
                self._call(self._log_inputs, [_input(each) for each in event["inputs"]])
            case "end":
                results = self.state.get("results", {}).values()
                for run_id in (*results, self.state["run_id"], self.state["parent"]):  # the parent: its latest stage's
                    self._call(self.client.set_terminated, run_id, event["status"], event["time"])

    def _start(self, event: Event) -> None:
        """Make the stage's run under its parent."""
        experiment, parent = make_parent_run(
            self.client, self.root, event["experiment"], event["pipeline"], event["profile"]
        )
        self.state |= {"parent": parent, "experiment": experiment}
        self.state["run_id"] = self._make_run("", event["name"], event)
        self.client.update_run(parent, status="RUNNING")
        for name, value in event["parent_tags"].items():
            self.client.set_tag(parent, name, value)

    def _make_run(self, of: str, name: str, event: Event) -> str:
        """A run under the parent; found again if it was made and the answer was lost."""
        mark = "/".join(filter(None, (self.journal.id, of)))
        if found := find_run(self.client, self.state["experiment"], "spo.journal", mark):
            return found
        tags = {"mlflow.parentRunId": self.state["parent"], "spo.journal": mark, **event["tags"]}
        run = self.client.create_run(self.state["experiment"], start_time=event["time"], tags=tags, run_name=name)
        return run.info.run_id

    def _run_of(self, event: Event) -> str:
        """The id of the run that an event is for."""
        match event.get("of"):
            case None:
                return self.state["run_id"]
            case tracker.PARENT:
                return self.state["parent"]
            case name:
                return self.state["results"][name]

    def _log_batches(self, event: Event, kind: str, rows: list[Any]) -> None:
        size = BATCH_SIZES[kind]
        for start in range(0, len(rows), size):
            self._call(self.client.log_batch, self._run_of(event), **{kind: rows[start : start + size]})

    def _log_inputs(self, found: list[Any]) -> None:
        """Log data sets, again if it is refused: the store does when another run adds the same one at that moment."""
        try:
            self.client.log_inputs(self.state["run_id"], found)
        except Exception as error:
            if not (_is_store_error(error) and refused(error)):
                raise
            self.client.log_inputs(self.state["run_id"], found)

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call the client; an event that the store refuses is dropped with a warning."""
        try:
            method(*arguments, **options)
        except Exception as error:
            if not (_is_store_error(error) and refused(error)):
                raise
            self._warn("refused", f"tracking lost something: {masked_line(error)}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self._warned.add(kind)


def send_unsent(root: Path = Path()) -> int:
    """Send the journals of processes that have ended; returns how many remain.

    The run of a killed process ends as KILLED. A damaged journal is named and kept.
    """
    client = connect(root)
    remaining = 0
    away = False
    for journal in Journal.left_behind(unsent(root)):
        try:
            if not away:
                away = not _send_whole(client, journal, root)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            remaining += 1
            print(
                f"warning: {journal.folder} cannot be sent: {masked_line(error)}; remove it if it is not needed",
                file=sys.stderr,
                flush=True,
            )
            continue
        if away:
            remaining += 1
        else:
            journal.remove()
    return remaining


def _send_whole(client: "MlflowClient", journal: Journal, root: Path) -> bool:
    """Send the journal of an ended process; returns whether all of it has arrived."""
    events = [event for event, _ in journal.after(0)]
    if events and events[0]["do"] == "start" and not any(event["do"] == "end" for event in events):
        journal.append("end", status="KILLED", time=int(time.time() * 1000))
    return Sender(client, journal, root).send()


def _together(events: list[tuple[Event, int]]) -> list[tuple[Event, int]]:
    """The first event, with the metrics of the same run that follow it if it is metrics, too."""
    first = events[0][0]
    if first["do"] != "metrics":
        return events[:1]
    return list(
        takewhile(lambda pair: [pair[0].get(key) for key in ("do", "of")] == ["metrics", first.get("of")], events)
    )


def _is_store_error(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException | OSError)


def _input(values: dict[str, Any]) -> Any:
    """A data set as MLflow's entity."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = json.dumps({"uri": values["source"]}), json.dumps(values["profile"])
    dataset = Dataset(values["name"], values["digest"], "local", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", values["context"])])
