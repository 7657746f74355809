"""What the machine does meanwhile, for MLflow's page of system metrics: CPU, memory, disk, network, and GPUs."""

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

EVERY = 10.0  # seconds


class SystemMetrics:
    """Measures while it is open, in a thread of its own; without MLflow, whose monitors it uses, it does nothing.

    Args:
        log: takes metrics and a step, which here counts seconds.
        since: the moment from which they are counted, in seconds since 1970.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], since: float) -> None:
        self._log, self._since, self._stop = log, since, threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def __enter__(self) -> "SystemMetrics":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        monitors: list | None = None
        while not self._stop.wait(EVERY):
            monitors = _monitors() if monitors is None else monitors
            seconds = int(time.time() - self._since)
            for monitor in monitors:
                monitor.collect_metrics()
                values = {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
                self._log(values, seconds)


def _monitors() -> list:
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError:
        return []
    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception:  # no GPU, or no driver to ask: each says so in its own way
        return monitors
    return monitors
