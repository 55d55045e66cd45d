"""Tracking of stages in MLflow. Only this package imports mlflow.

The store is MLFLOW_TRACKING_URI, or else the project's own: mlflow/mlflow.db and mlflow/artifacts. A stage is one
run; the stages of a pipeline run share a parent run, found by its tag `spo.pipeline`.

    tracker.py   the interface for stages; it writes to a journal on the disk at once
    journal.py   the journal mlflow/unsent/<id>, removed when the store has all of it
    sender.py    sends a journal's events to the store, now or at a later start
    heartbeat.py a thread that sends every ten seconds, and measures the machine
    store.py     the store: client, experiment, parent run
    facts.py     facts about a run: commit, versions, data sets and their hashes
    run.py       `start`: one stage's run from beginning to end
    registry.py  aligned LoRAs as versions of a registered model; one of them is the champion
"""

from spo.tracking.run import start
from spo.tracking.sender import send_unsent
from spo.tracking.store import PIPELINE_RUN, fetch_model, masked, pipeline_id, store, store_errors
from spo.tracking.tracker import NullTracker, Tracker

__all__ = [
    "PIPELINE_RUN",
    "NullTracker",
    "Tracker",
    "fetch_model",
    "masked",
    "pipeline_id",
    "send_unsent",
    "start",
    "store",
    "store_errors",
]
