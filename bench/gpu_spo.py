"""Batches of SPO on one system: ours against the published way, where the time goes, and what `check` would say."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from bench.flops import batch_flops, last_steps
from bench.gpu_bench import Bench, Meter, in_use
from bench.gpu_run import forget
from bench.measure import Stopwatch
from bench.ours import OurPath
from bench.plain import PlainPath
from bench.profile_step import REST, SECTIONS, attached
from bench.spo_step import compare
from bench.systems import SHAPES, System
from spo.config import SamplingConfig
from spo.errors import is_out_of_memory

WAYS = {"ours": OurPath, "plain": PlainPath}
RUN_METRICS = ("unet_forwards", "vae_decodes", "num_examples", "seconds")
MOST_RUNS = 3  # of each way, while there is time
CHECKED_PROMPTS, CHECKED_PAIRS = 2, 64  # as in spo.stages.check, which imports too much for a bare machine
UPDATES = tuple(name for name in SECTIONS if name.startswith("updates"))
GROUPS = {
    "network, sampling": ("rollout: network",),
    "VAE": ("rollout: VAE decode",),
    "preference model": ("rollout: preference model",),
    "updates": UPDATES,
    "rest": ("text towers", REST),
}


def duel(bench: Bench, figures: dict[str, Any], *, family: str) -> None:
    """One batch by our path and by the published way: same process, weights, noise and order; in turns.

    Where memory is short for updates of the recipe's size, both are measured once more with half of it.
    """
    system = batch_of(bench, figures, family)
    figures["shared_bytes"] = in_use(bench.device)  # the system's own, which both ways need
    figures["rehearsal_seconds"] = {}
    for way in WAYS:
        with Meter(bench.device) as meter:
            _run(way, few(system), bench, rehearsal=True)
        figures["rehearsal_seconds"][way] = meter.seconds
    whole = system.settings.batch_size
    try:
        return _take_turns(system, bench, figures)
    except Exception as error:
        if not is_out_of_memory(error) or whole == 1:
            raise
        forget(error)
    figures["at_first"] = {name: figures.pop(name) for name in ("batch_size", "runs")}
    figures["note"] = f"out of memory with updates of {whole} pairs, so they have {whole // 2}"
    smaller = system.settings.model_copy(update={"batch_size": whole // 2})
    _take_turns(replace(system, settings=smaller), bench, figures)


def where(bench: Bench, figures: dict[str, Any], *, family: str) -> None:
    """Seconds of our batch by what they are for; the GPU is waited for between sections, which costs a little."""
    system = batch_of(bench, figures, family)
    _run("ours", few(system), bench, rehearsal=True)
    watch = Stopwatch(bench.device)
    with _path("ours", system) as path:
        with attached(watch, path), Meter(bench.device) as meter:
            pairs, _ = path.run()
    seconds = {name: watch.seconds[name] for name in SECTIONS}
    seconds[REST] = meter.seconds - sum(seconds.values())
    figures |= {"seconds": meter.seconds, "pairs": len(pairs["t"]), "sections": seconds, "peak_bytes": meter.peak_bytes}
    figures["seconds_a_pair"] = meter.seconds / len(pairs["t"])
    figures["groups"] = {name: sum(seconds[each] for each in group) for name, group in GROUPS.items()}
    figures |= _floor(system, bench, len(pairs["t"]), meter.seconds)


def compiled(bench: Bench, figures: dict[str, Any], *, family: str) -> None:
    """Our batch without model.compile and with it; the batch that compiles counts apart."""
    system = batch_of(bench, figures, family)
    _run("ours", few(system), bench, rehearsal=True)
    runs = figures["runs"] = {"as it is": _run("ours", system, bench)}
    try:
        with _path("ours", system) as path:  # one for both batches: another LoRA compiles anew
            bench.compile(system.policy)
            for label, call in (("the first batch, which compiles", path.rehearse), ("compiled", path.run)):
                bench.tidy()
                with Meter(bench.device) as meter:
                    outcome = call()
                runs[label] = {"seconds": meter.seconds, "peak_bytes": meter.peak_bytes}
        agreement = compare(runs["as it is"].outcome, _outcome(*outcome), least=0.8 if bench.full else 0.98)
        figures["largest_loss_difference"] = agreement["largest_loss_difference"]
    finally:
        bench.drop_compiled()


def check(bench: Bench, figures: dict[str, Any]) -> None:
    """What `python -m spo check` would say of a batch, from its miniature, beside what the batch takes.

    check runs two prompts twice, the first time to warm up, and updates of as many pairs as are in memory at a time; a
    forward's share of the second time is what every forward is taken to cost. Its memory is that of the miniature, and
    said to be so.
    """
    system = batch_of(bench, figures, "sd15")
    _run("ours", few(system), bench, rehearsal=True)
    small = replace(
        system,
        settings=system.settings.model_copy(
            update=system.settings.miniature(examples=CHECKED_PAIRS, prompts=CHECKED_PROMPTS) | {"epochs": 1}
        ),
        prompts=system.prompts[:CHECKED_PROMPTS],
    )
    figures["miniature"] = _run("ours", small, bench)
    metrics = figures["miniature"]["metrics"]
    forwards = metrics["unet_forwards"] * len(system.prompts) / CHECKED_PROMPTS
    figures["estimated_seconds"] = forwards * metrics["seconds"] / max(1, metrics["unet_forwards"])
    figures["estimated_bytes"] = figures["miniature"]["peak_bytes"]
    found = bench.figures.get("spo-sd15", {}).get("runs", {}).get("ours") or [_run("ours", system, bench)]
    figures["measured_seconds"] = statistics.median(run["metrics"]["seconds"] for run in found)
    figures["measured_bytes"] = found[0]["peak_bytes"]
    figures["estimate_over_measured"] = figures["estimated_seconds"] / figures["measured_seconds"]


def batch_of(bench: Bench, figures: dict[str, Any], family: str) -> System:
    """The family's system with one batch; what it is goes into the figures."""
    system = bench.system(family)
    settings = system.settings
    figures |= {
        "shape": bench.shape(family),
        "resolution": SHAPES[bench.shape(family)].resolution,
        "steps": len(system.policy.timesteps),
        "prompts": len(system.prompts),
        "candidates": settings.candidates,
        "branch_steps": settings.branch_steps,
    }
    return system


def few(system: System) -> System:
    """As little as calls every kernel once: steps up to the end of the first segment."""
    settings = system.settings
    least = settings.first_step + settings.branch_steps + last_steps(SHAPES[system.size])
    policy, now = system.policy, system.policy.sampler
    sampling = SamplingConfig(steps=least, eta=now.eta, guidance_scale=now.guidance_scale)
    return replace(system, policy=replace(policy, sampler=policy.network.sampler(sampling)))


@contextmanager
def _path(way: str, system: System) -> Iterator[Any]:
    """A way's path over the system, which is as before afterwards."""
    try:
        yield WAYS[way](system, seed=0)
    finally:
        if system.policy.network.has_adapter:
            system.policy.network.module.unload_lora()


def _run(way: str, system: System, bench: Bench, *, rehearsal: bool = False) -> dict[str, Any]:
    """Run a batch once; its seconds, most bytes in use, pairs (on the CPU) and losses."""
    with _path(way, system) as path:
        bench.tidy()
        with Meter(bench.device) as meter:
            pairs, losses = path.run()
        if rehearsal:
            return {}
        run: dict[str, Any] = {"seconds": meter.seconds, "peak_bytes": meter.peak_bytes, "updates": len(losses)}
        if way == "ours":
            run["metrics"] = {name: path.metrics[name] for name in RUN_METRICS}
    return Measured(run, outcome=_outcome(pairs, losses))


def _outcome(pairs: dict[str, Tensor], losses: list[float]) -> dict[str, Any]:
    """What a batch came to, on the CPU."""
    return {"pairs": {name: pairs[name].cpu() for name in ("x_t", "x_prev", "t", "t_prev")}, "losses": losses}


class Measured(dict[str, Any]):
    """A run's figures, and beside them, for no file, what it came to."""

    def __init__(self, figures: dict[str, Any], *, outcome: dict[str, Any]):
        super().__init__(figures)
        self.outcome = outcome


def _take_turns(system: System, bench: Bench, figures: dict[str, Any]) -> None:
    """Run both ways in turns while there is time, and compare them; the figures stand after each turn."""
    runs: dict[str, list[Any]] = {way: [] for way in WAYS}
    figures |= {"batch_size": system.settings.batch_size, "runs": runs}
    for _ in range(MOST_RUNS if bench.full else 1):
        for way in WAYS:
            runs[way].append(_run(way, system, bench))
        figures |= _against(runs, system, bench, figures["shared_bytes"])
        if not bench.deadline.spare(sum(each[-1]["seconds"] for each in runs.values())):
            break


def _against(runs: dict[str, list[Any]], system: System, bench: Bench, shared: int | None) -> dict[str, Any]:
    """Medians of each way, their ratio, and whether they came to the same."""
    first = {way: each[0] for way, each in runs.items()}
    num_pairs = len(first["ours"].outcome["pairs"]["t"])
    seconds = {way: statistics.median(run["seconds"] for run in each) for way, each in runs.items()}
    agreement = compare(first["plain"].outcome, first["ours"].outcome, least=0.8 if bench.full else 0.98)
    found: dict[str, Any] = {"pairs": num_pairs, **agreement, "times_faster": seconds["plain"] / seconds["ours"]}
    for way, each in runs.items():
        peak = each[0]["peak_bytes"]
        found[way] = {
            "seconds": seconds[way],
            "seconds_a_pair": seconds[way] / num_pairs,
            "peak_bytes": peak,
            "above_shared_bytes": None if peak is None or shared is None else peak - shared,
            **_floor(system, bench, num_pairs, seconds[way]),
        }
    if found["plain"]["peak_bytes"]:
        found["share_of_peak"] = found["ours"]["peak_bytes"] / found["plain"]["peak_bytes"]
    return found


def _floor(system: System, bench: Bench, num_pairs: int, seconds: float) -> dict[str, float]:
    """Seconds that our batch's operations take at the rate of a large product, and their share of `seconds`."""
    shape = SHAPES[system.size]
    flops = sum(batch_flops(shape, system.settings, num_pairs, steps=len(system.policy.timesteps)).values())
    floor = flops / bench.rates()["product_flops_a_second"]
    return {"floor_seconds": floor, "share_of_floor": floor / seconds}
