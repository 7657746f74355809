"""How busy the machine is, under the names of MLflow's page of system metrics: CPU, memory, disk and NVIDIA GPUs."""

from contextlib import suppress

import psutil

MB = 1e6


def system_metrics() -> dict[str, float]:
    """The machine's present state; the use of the CPU is the mean since the last call."""
    memory = psutil.virtual_memory()
    metrics = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MB,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": psutil.disk_usage(".").percent,
    }
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):  # no driver, or a GPU that does not measure this
            pynvml.nvmlInit()
            for number in range(pynvml.nvmlDeviceGetCount()):
                gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
                memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
                metrics[f"gpu_{number}_memory_usage_megabytes"] = memory.used / MB
                metrics[f"gpu_{number}_memory_usage_percentage"] = 100 * memory.used / memory.total
                metrics[f"gpu_{number}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
                metrics[f"gpu_{number}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return {f"system/{name}": value for name, value in metrics.items()}
