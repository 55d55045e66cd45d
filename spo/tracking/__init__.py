"""What a stage reports while it runs, and where: MLflow. Nothing else of ours imports it.

The store is MLFLOW_TRACKING_URI, or else the project's own: mlflow/mlflow.db and mlflow/artifacts. A stage is one
run; the stages of one pipeline run hang under one parent run, known by the tag `spo.pipeline`.

    tracker.py   what a stage calls: everything is written to a journal on the disk at once
    journal.py   that journal: mlflow/unsent/<id>, gone when all of it has arrived
    sender.py    takes a journal's events to the store, now or at a later start
    heartbeat.py the thread that does so every ten seconds, with the machine's figures
    store.py     the store itself: client, experiment, parent run
    facts.py     what a run was made with: commit, versions, data sets and their hashes
    run.py       `start`: one stage's run from beginning to end
    registry.py  aligned LoRAs as versions of a registered model, one of them the champion
"""

from spo.tracking.run import start
from spo.tracking.sender import send_unsent
from spo.tracking.store import PIPELINE_RUN, fetch_model, masked, pipeline_id, spoken, store
from spo.tracking.tracker import NullTracker, Tracker

__all__ = [
    "PIPELINE_RUN",
    "NullTracker",
    "Tracker",
    "fetch_model",
    "masked",
    "pipeline_id",
    "send_unsent",
    "spoken",
    "start",
    "store",
]
