"""A batch of SPO with a pixel and with a latent preference model, on the same system."""

from typing import Any

from bench.gpu_bench import Bench, Meter
from bench.gpu_spo import batch_of, few
from bench.ours import OurPath
from bench.preference_kinds import KINDS
from bench.systems import System


def kinds(bench: Bench, figures: dict[str, Any], *, family: str) -> None:
    """What a kept pair costs with each kind; every pair is kept. The figures stand after each kind."""
    system = batch_of(bench, figures, family)
    figures["kinds"] = {}
    measured = bench.figures.get(f"spo-{family}", {}).get("runs", {}).get("ours")
    if measured:  # the same batch
        figures["kinds"]["pixel"] = _figures(measured[0], measured[0]["metrics"])
    for kind in KINDS:
        if kind not in figures["kinds"]:
            _run(few(system), bench, kind)
            figures["kinds"][kind] = _run(system, bench, kind)
    pixel, latent = (figures["kinds"][kind]["seconds_a_pair"] for kind in KINDS)
    figures["times_faster"] = pixel / latent


def _run(system: System, bench: Bench, kind: str) -> dict[str, Any]:
    try:
        path = OurPath(system, seed=0, kind=kind)
        bench.tidy()
        with Meter(bench.device) as meter:
            path.run()
        return _figures({"seconds": meter.seconds, "peak_bytes": meter.peak_bytes}, path.metrics)
    finally:
        if system.policy.network.has_adapter:
            system.policy.network.module.unload_lora()


def _figures(run: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    pairs = metrics["num_examples"]
    return {
        "pairs": pairs,
        "seconds": run["seconds"],
        "seconds_a_pair": run["seconds"] / pairs,
        "forwards_a_pair": metrics["unet_forwards"] / pairs,
        "decodes_a_pair": metrics["vae_decodes"] / pairs,
        "peak_bytes": run["peak_bytes"],
    }
