"""Prefect around the pipeline: it starts DVC's stages by their names and shows their output.

These settings must come before prefect is imported: no telemetry, a private server unless PREFECT_API_URL names one,
and time for it to start on a slow machine.
"""

import os

_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
}

for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
