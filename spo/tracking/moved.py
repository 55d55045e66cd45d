"""A checkout that was moved or copied: its database names the folder in which MLflow wrote artifacts before.

MLflow stores absolute addresses only. Without this a copy would write into the original's folder.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

COLUMNS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
MOVED = """
    SELECT DISTINCT substr(artifact_location, 1, length(artifact_location) - length('/mlflow/artifacts/' || name))
    FROM experiments
    WHERE artifact_location LIKE 'file:///%' AND artifact_location LIKE '%/mlflow/artifacts/' || name
        AND artifact_location <> ? || '/mlflow/artifacts/' || name
"""


def follow_move(database: Path, root: str) -> None:
    """Point the artifacts of our experiments to `root`, the file:// address of the checkout that has the database."""
    if not database.is_file():
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables >= COLUMNS.keys():  # empty, or of an older version
            return
        for (before,) in connection.execute(MOVED, (root,)).fetchall():
            for table, column in COLUMNS.items():
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (root, len(before) + 1, len(before) + 1, f"{before}/"),
                )
