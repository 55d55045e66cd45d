"""Tracking of stages in MLflow. Only this package imports mlflow.

The store is MLFLOW_TRACKING_URI, or else the project's own: mlflow/mlflow.db and mlflow/artifacts. A stage is one
run; the stages of a pipeline run share a parent run, found by its tag `spo.pipeline`.

A stage's tracker writes to a journal on the disk at once (tracker.py, journal.py). A thread sends the journal's events
to the store every ten seconds, or a later start does (heartbeat.py, sender.py).
"""

from spo.tracking.run import start
from spo.tracking.sender import send_unsent
from spo.tracking.store import PIPELINE_RUN, database, fetch_model, masked, note_ui, pipeline_id, store, store_errors
from spo.tracking.tracker import NullTracker, Tracker

__all__ = [
    "PIPELINE_RUN",
    "NullTracker",
    "Tracker",
    "database",
    "fetch_model",
    "masked",
    "note_ui",
    "pipeline_id",
    "send_unsent",
    "start",
    "store",
    "store_errors",
]
