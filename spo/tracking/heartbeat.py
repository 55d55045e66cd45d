"""Every ten seconds during a stage: measure the machine, and send the journal to the store."""

import threading
from contextlib import suppress
from typing import Any

from spo.tracking.sender import Sender
from spo.tracking.tracker import Tracker

SECONDS = 10.0


class Heartbeat(threading.Thread):
    """A thread, so that a slow or unreachable server never delays training."""

    def __init__(self, tracker: Tracker, sender: Sender):
        super().__init__(name="tracking", daemon=True)
        self._tracker = tracker
        self._sender = sender
        self._monitors = _monitors()
        self._over = threading.Event()
        self._beats = 0

    def run(self) -> None:
        while not self._over.wait(SECONDS):
            self._measure()
            self._sender.send()

    def stop(self, seconds: float | None = None) -> None:
        """End the thread and measure once more; the caller sends the rest.

        It waits at most `seconds` for a server that hangs; None: without a limit.
        """
        self._over.set()
        self.join(seconds)
        self._measure()

    def _measure(self) -> None:
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self._tracker.log_metrics({f"system/{name}": value for name, value in metrics.items()}, step=self._beats)
        self._beats += 1


def _monitors() -> list[Any]:
    """MLflow's monitors of processor and memory, disk, network, and GPUs if there are any."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # nvidia-ml-py or a GPU is missing
        monitors.append(GPUMonitor())
    monitors[0].collect_metrics()  # the first processor load is always 0
    monitors[0].clear_metrics()
    return monitors
