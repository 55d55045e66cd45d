"""Where the time of one SPO batch goes: sampling its pairs, judging them, and the updates on them.

    python -m bench.profile_step --size tiny        # the embedded default
    python -m bench.profile_step --size small       # Stable Diffusion v1.5 in small
    python -m bench.profile_step --size sd15        # full size, random weights, on a GPU; sdxl likewise
    python -m bench.profile_step --size sd15 --device cpu --prompts 1 --micro-batch-size 1     # the same on the CPU

Runs `spo.training.align.align` itself for one batch and times what it calls. On a CPU seconds are of this process's
CPU time; on a GPU of the wall clock, waiting for the GPU between sections, which costs a little.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.flops import batch_flops
from bench.markdown import table
from bench.measure import RESULTS, PeakMemory, Stopwatch, clock, machine, matmul_rate, save
from bench.ours import OurPath
from bench.systems import DEVICES, SHAPES, device_of, make_system
from spo.runtime.libraries import set_up_libraries

SECTIONS = (
    "rollout: network",
    "rollout: VAE decode",
    "rollout: preference model",
    "text towers",
    "updates: policy forward",
    "updates: reference forward",
    "updates: backward",
    "updates: optimizer",
)
REST = "everything else"


def profile(size: str, *, device: torch.device | None = None, **changes: Any) -> dict[str, Any]:
    """Seconds by section of one batch, its peak of memory, and where they are known, operations and their floor.

    device: None for that of the size, a GPU for a full one.
    """
    device = device or device_of(size)
    path = OurPath(make_system(size, device, **changes), seed=0)
    watch = Stopwatch(device)
    with PeakMemory(device) as memory, attached(watch, path):
        start = clock(device)
        pairs, losses = path.run()
        total = clock(device) - start
    seconds = {name: watch.seconds[name] for name in SECTIONS}
    seconds[REST] = total - sum(seconds.values())
    result = {
        "size": size,
        "machine": machine(device),
        "prompts": len(path.method.prompts),
        "pairs": len(pairs["t"]),
        "updates": len(losses),
        "total_seconds": total,
        "seconds": seconds,
        "peak_bytes": memory.peak,
    }
    if size in SHAPES:
        rate = matmul_rate(device, path.policy.dtype)
        flops = batch_flops(SHAPES[size], path.settings, len(pairs["t"]), steps=len(path.policy.timesteps))
        result |= {"flops": flops, "matmul_flops_a_second": rate, "floor_seconds": sum(flops.values()) / rate}
    return result


@contextmanager
def attached(watch: Stopwatch, path: OurPath) -> Iterator[None]:
    """Time the parts of a batch within the block."""
    policy, scorer, loss, reference = path.policy, path.scorer, path.method.loss, path.policy.network.reference
    inside: list[str] = []  # what has been entered of loss and reference

    @contextmanager
    def within(name: str) -> Iterator[None]:
        inside.append(name)
        try:
            yield
        finally:
            inside.pop()

    def timed_loss(pairs: Any) -> Any:
        with within("policy"):
            return loss(pairs)

    @contextmanager
    def timed_reference() -> Iterator[None]:
        with reference(), within("reference"):
            yield

    path.method.loss, policy.network.reference = timed_loss, timed_reference  # type: ignore[method-assign]
    watch.time(
        policy.network.module, "forward", lambda: f"updates: {inside[-1]} forward" if inside else "rollout: network"
    )
    watch.time(policy.autoencoder, "decode", "rollout: VAE decode")
    watch.time(policy.network, "encode", "text towers")
    watch.time(scorer, "encode", "text towers")
    watch.time(scorer.model, "modulated_features", "rollout: preference model")
    watch.time(scorer, "preprocess", "rollout: preference model")
    watch.time(torch.Tensor, "backward", "updates: backward")
    watch.time(torch.optim.AdamW, "step", "updates: optimizer")
    try:
        yield
    finally:
        watch.restore()
        del path.method.loss, policy.network.reference  # the classes' own stand again


def show(result: dict[str, Any]) -> str:
    total = result["total_seconds"]
    rows = [["", "s", "share"]]
    rows += [[name, f"{value:.2f}", f"{value / total:.1%}"] for name, value in result["seconds"].items()]
    rows.append(["all", f"{total:.2f}", "100%"])
    lines = [
        f"{result['size']}: {result['prompts']} prompts, {result['pairs']} pairs, {result['updates']} updates; "
        f"{result['machine']}",
        "",
        table(rows),
        "",
        f"peak memory {result['peak_bytes'] / 1e9:.2f} GB",
    ]
    if "flops" in result:
        lines.append(
            f"floor {result['floor_seconds']:.2f} s ({sum(result['flops'].values()) / 1e12:.2f} TFLOP at the "
            f"{result['matmul_flops_a_second'] / 1e12:.3f} TFLOP/s of a matrix product here): "
            f"{total / result['floor_seconds']:.2f} times the floor"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "tiny"], default="small")
    parser.add_argument("--device", choices=DEVICES, help="(default: cuda for a full size, else cpu)")
    parser.add_argument("--prompts", type=int, help="of the batch (default: the size's own)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: the size's own)")
    parser.add_argument("--micro-batch-size", type=int, help="pairs that go through the UNet at a time in updates")
    parser.add_argument(
        "--out", type=Path, help="JSON file of all figures (default: bench/results/profile_step-SIZE.json)"
    )
    options = parser.parse_args()
    set_up_libraries()
    changes = {"prompts": options.prompts, "steps": options.steps, "micro_batch_size": options.micro_batch_size}
    result = profile(options.size, device=device_of(options.size, options.device), **changes)
    print(show(result))
    save(options.out or RESULTS / f"profile_step-{options.size}.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
