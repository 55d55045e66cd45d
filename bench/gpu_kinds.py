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
    for kind in KINDS:
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
        pairs = path.metrics["num_examples"]
        return {
            "pairs": pairs,
            "seconds": meter.seconds,
            "seconds_a_pair": meter.seconds / pairs,
            "forwards_a_pair": path.metrics["unet_forwards"] / pairs,
            "decodes_a_pair": path.metrics["vae_decodes"] / pairs,
            "peak_bytes": meter.peak_bytes,
        }
    finally:
        if system.policy.network.has_adapter:
            system.policy.network.module.unload_lora()
