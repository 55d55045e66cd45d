"""One SPO batch with each kind of preference model: pixel, which scores decoded images, and latent.

    python -m bench.preference_kinds                  # the embedded default
    python -m bench.preference_kinds --size small     # Stable Diffusion v1.5 in small; sd15 and sdxl on a GPU

Each run is a process of its own; the kinds take turns, and figures are medians. Every pair is kept, so costs are those
of a branched step. A pass of the latent model counts as half a UNet forward.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from bench.markdown import table
from bench.measure import RESULTS, PeakMemory, at_least, clock, machine, save
from bench.ours import OurPath
from bench.systems import DEVICES, SHAPES, device_of, make_system
from spo.runtime.libraries import set_up_libraries

KINDS = ("pixel", "latent")
ROWS = {  # figure and unit
    "unet_forwards": ("UNet forwards a pair", 1),
    "decodes": ("decoded images a pair", 1),
    "seconds": ("seconds a pair", 1),
    "peak_bytes": ("peak memory, GB", 1e9),
}


def run_one(size: str, kind: str, on: str | None = None) -> dict[str, Any]:
    """The costs of a batch with a preference model of this kind, on a device or the size's own."""
    device = device_of(size, on)
    set_up_libraries()
    path = OurPath(make_system(size, device), seed=0, kind=kind)
    with PeakMemory(device) as memory:
        start = clock(device)
        path.run()
        seconds = clock(device) - start
    pairs = path.metrics["num_examples"]
    return {
        "unet_forwards": path.metrics["unet_forwards"] / pairs,
        "decodes": path.metrics["vae_decodes"] / pairs,
        "seconds": seconds / pairs,
        "peak_bytes": memory.peak,
        "pairs": pairs,
        "machine": machine(device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.preference_kinds", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument("--device", choices=DEVICES, help="(default: cuda for a full size, else cpu)")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)  # of the process that runs one batch
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(run_one(options.size, options.kind, options.device)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(options.repeats):
        for kind, found in runs.items():
            command = [sys.executable, "-m", "bench.preference_kinds", "--size", options.size, "--kind", kind]
            command += ["--device", options.device] if options.device else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    medians = {
        kind: {key: statistics.median(run[key] for run in found) for key in ROWS} for kind, found in runs.items()
    }
    print(show(medians, options.size, runs["pixel"][0]))
    save(RESULTS / f"preference_kinds-{options.size}.json", {"size": options.size, **medians, "runs": runs})
    return 0


def show(medians: dict[str, dict[str, float]], size: str, run: dict[str, Any]) -> str:
    lines = [["", *KINDS, "latent of pixel"]]
    for key, (name, unit) in ROWS.items():
        pixel, latent = medians["pixel"][key] / unit, medians["latent"][key] / unit
        lines.append([name, f"{pixel:.3g}", f"{latent:.3g}", f"{latent / pixel:.2f}"])
    return f"{size}: {run['pairs']} pairs; {run['machine']}\n\n{table(lines)}"


if __name__ == "__main__":
    sys.exit(main())
