"""One SPO batch by our path against what the published code does: same weights, same noise, same pairs and losses.

    python -m bench.spo_step                        # Stable Diffusion v1.5 in small, on the CPU
    python -m bench.spo_step --size sd15            # full size, random weights, on a GPU; sdxl likewise
    python -m bench.spo_step --size sd15 --device cpu --prompts 1 --micro-batch-size 1          # the same on the CPU

Each run is a process of its own, so that its peak of memory is its own; the two paths take turns, and ratios are of
medians. Ends with code 1 where pairs or losses differ.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.markdown import table
from bench.measure import RESULTS, PeakMemory, clock, machine, save
from bench.ours import OurPath
from bench.plain import PlainPath
from bench.systems import DEVICES, SHAPES, compile_policy, device_of, make_system
from spo.runtime.libraries import set_up_libraries

PATHS = {"plain": PlainPath, "ours": OurPath}
SEED = 0


def main() -> int:
    options = _options()
    if options.path:
        run_one(options)
        return 0
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PATHS}
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / f"{name}.pt" for name in PATHS}
        for _ in range(options.repeats):
            for name in PATHS:
                runs[name].append(_in_a_process(name, options, outputs[name]))
                print(f"{name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        on_gpu = device_of(options.size, options.device).type == "cuda"
        least = 0.8 if on_gpu else 0.98  # of half precision's near-ties some fall otherwise
        agreement = compare(*(torch.load(outputs[name]) for name in PATHS), least=least)
    result = summary(runs, agreement, options)
    print(show(result))
    save(options.out or RESULTS / f"spo_step-{options.size}.json", result)
    return 0 if agreement["agrees"] else 1


def run_one(options: argparse.Namespace) -> None:
    """Run one path once; its measurements as JSON on standard output, its pairs and losses in a file."""
    device = device_of(options.size, options.device)
    set_up_libraries()
    changes = {"prompts": options.prompts, "steps": options.steps, "micro_batch_size": options.micro_batch_size}
    system = make_system(options.size, device, **changes)
    path = PATHS[options.path](system, seed=SEED)
    if options.compile and isinstance(path, OurPath):
        compile_policy(path.policy)
        path.rehearse()
    gc.collect()
    with PeakMemory(device) as memory:
        start = clock(device)
        pairs, losses = path.run()
        seconds = clock(device) - start
    pairs = {name: pairs[name].cpu() for name in ("x_t", "x_prev", "t", "t_prev")}
    torch.save({"pairs": pairs, "losses": losses}, options.out)
    measured = {
        "seconds": seconds,
        "pairs": len(pairs["t"]),
        "updates": len(losses),
        "peak_bytes": memory.peak,
        "peak_bytes_above_start": memory.above,
        "machine": machine(device),
    }
    print(json.dumps(measured))


def compare(plain: dict[str, Any], ours: dict[str, Any], *, least: float) -> dict[str, Any]:
    """Whether both paths came to the same losses and at `least` that share of the same pairs.

    A pair is the same if win and lose are the same candidates. Their latents may differ by the rounding of many steps,
    so long as they differ by less than half of what two candidates of one x_t differ by.
    """
    one, other = plain["pairs"], ours["pairs"]
    if len(one["t"]) != len(other["t"]):
        return {"agrees": False, "identical_pairs": 0.0, "largest_loss_difference": float("nan")}
    distance = (one["x_prev"] - other["x_prev"]).flatten(2).norm(dim=2).amax(1)
    between = (one["x_prev"][:, 0] - one["x_prev"][:, 1]).flatten(1).norm(dim=1)
    same = (distance < between / 2) & (one["t"] == other["t"]) & (one["t_prev"] == other["t_prev"])
    identical = same.float().mean().item()
    difference = max(abs(a - b) for a, b in zip(plain["losses"], ours["losses"], strict=True))
    agrees = identical >= least and difference < 1e-2
    return {"agrees": agrees, "identical_pairs": identical, "largest_loss_difference": difference}


def summary(
    runs: dict[str, list[dict[str, Any]]], agreement: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    medians = {
        name: {
            "seconds": statistics.median(run["seconds"] for run in each),
            "seconds_a_pair": statistics.median(run["seconds"] / run["pairs"] for run in each),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in each),
            "peak_bytes_above_start": statistics.median(run["peak_bytes_above_start"] for run in each),
        }
        for name, each in runs.items()
    }
    first = runs["plain"][0]
    return {
        "size": options.size,
        "machine": first["machine"],
        "pairs": first["pairs"],
        "updates": first["updates"],
        "repeats": options.repeats,
        "micro_batch_size": options.micro_batch_size,
        "compile": options.compile,
        **medians,
        "times_faster": medians["plain"]["seconds"] / medians["ours"]["seconds"],
        "share_of_peak": medians["ours"]["peak_bytes"] / medians["plain"]["peak_bytes"],
        "share_of_peak_above_start": medians["ours"]["peak_bytes_above_start"]
        / medians["plain"]["peak_bytes_above_start"],
        **agreement,
        "runs": runs,
    }


def show(result: dict[str, Any]) -> str:
    plain, ours = result["plain"], result["ours"]
    rows = [["", "published way", "ours", "ratio"]]
    for name, key, unit in (
        ("s a batch", "seconds", 1),
        ("s a kept pair", "seconds_a_pair", 1),
        ("peak memory, GB", "peak_bytes", 1e9),
        ("of it above the start, GB", "peak_bytes_above_start", 1e9),
    ):
        a, b = plain[key] / unit, ours[key] / unit
        ratio = f"{a / b:.2f} times faster" if key.startswith("seconds") else f"{b / a:.2f} of it"
        rows.append([name, f"{a:.3g}", f"{b:.3g}", ratio])
    return "\n".join(
        [
            f"{result['size']}: {result['pairs']} pairs, {result['updates']} updates, median of {result['repeats']} "
            f"runs each, in turns; {result['machine']}",
            "",
            table(rows),
            "",
            f"identical pairs: {result['identical_pairs']:.1%}; largest difference of an update's loss: "
            f"{result['largest_loss_difference']:.1e}; {'agrees' if result['agrees'] else 'DOES NOT AGREE'}",
        ]
    )


def _in_a_process(path: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.spo_step", "--path", path, "--size", options.size, "--out", str(out)]
    for name in ("prompts", "steps", "micro_batch_size"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--device", options.device] if options.device else []
    command += ["--compile"] if options.compile else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "tiny"], default="small")
    parser.add_argument("--device", choices=DEVICES, help="(default: cuda for a full size, else cpu)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each path")
    parser.add_argument("--prompts", type=int, help="of the batch (default: the size's own)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: the size's own)")
    parser.add_argument("--micro-batch-size", type=int, help="pairs that our updates put through the UNet at a time")
    parser.add_argument("--compile", action="store_true", help="model.compile for our path; compiling is not timed")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)  # run one, in this process
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
