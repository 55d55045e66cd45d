"""How long the device computes while a part of SPO runs, in how many kernels, and in which most of the time goes.

Where the seconds of the kernels are far fewer than the part's, the GPU waits for the CPU, which launches them.
"""

from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.gpu_bench import Bench, Meter
from bench.gpu_switches import Parts

TOP = 8


def busy(bench: Bench, figures: dict[str, Any]) -> None:
    """Of SD v1.5's parts: seconds without the profiler, and their kernels. On a CPU operators stand for kernels."""
    cuda = bench.device.type == "cuda"
    system = bench.system("sd15")
    found: dict[str, dict[str, Any]] = figures.setdefault("parts", {})
    try:
        parts = Parts(system)
        for name in ("sample", "update", "decode", "score"):
            call = getattr(parts, name)
            call()
            with Meter(bench.device) as meter:
                call()
            with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
                call()
                Meter(bench.device).__enter__()  # waits for the device
            kernels = [
                (event.key, event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
                for event in profiler.key_averages()
            ]
            kernels = sorted((kernel for kernel in kernels if kernel[1] > 0), key=lambda kernel: -kernel[1])
            found[name] = {
                "seconds": meter.seconds,
                "kernel_seconds": sum(time for _, time, _ in kernels) / 1e6,
                "kernels": sum(count for _, _, count in kernels),
                "top": [[key[:100], time / 1e6, count] for key, time, count in kernels[:TOP]],
            }
    finally:
        if system.policy.network.has_adapter:
            system.policy.network.module.unload_lora()
