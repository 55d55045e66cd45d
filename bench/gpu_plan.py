"""What each row of `bench.gpu` should take at full size on an H100, from the operations that it does; an estimate."""

from collections.abc import Sequence

from bench.flops import GPU_RATE, UTILISATION, batch_flops, count, last_steps
from bench.gpu_parts import step_cost
from bench.gpu_rows import Row
from bench.markdown import table
from bench.systems import SHAPES
from spo.config import SpoConfig

START_SECONDS = 30  # imports, the first kernels, and systems that are made anew


def plan(rows: Sequence[Row], *, minutes: float) -> str:
    """The rows in order, with seconds at UTILISATION times the floor of GPU_RATE; those of each run of a way, once."""
    estimates = [estimate(row) for row in rows]
    lines = [["row", "estimate, s", "not begun below, s"]]
    lines += [[row.name, f"{seconds:.0f}", f"{row.least:.0f}"] for row, seconds in zip(rows, estimates, strict=True)]
    total = START_SECONDS + sum(estimates)
    return (
        f"{table(lines)}\n\nin all about {total / 60:.1f} of {minutes:g} minutes, {START_SECONDS} s to start included: "
        f"estimated for an H100, {GPU_RATE / 1e12:.0f} TFLOP/s and {UTILISATION} times the floor, never measured. "
        "What is left over goes into repeats."
    )


def estimate(row: Row) -> float:
    """Seconds; of what is no batch and no step of training the least that is planned for it."""
    kind, _, rest = row.name.partition("-")
    if kind in ("spo", "where"):
        ours, plain = batch_cost(rest)
        return UTILISATION * (ours + plain * (kind == "spo")) / GPU_RATE
    if kind == "preference":
        flops, _ = step_cost("sd15", int(rest))
        return 4 * UTILISATION * flops / GPU_RATE
    return row.least


def batch_cost(size: str) -> tuple[float, float]:
    """Operations of a batch by our path and by the published way, which has four forwards a pair; all pairs kept."""
    shape = SHAPES[size]
    settings, steps = SpoConfig(**shape.settings), shape.steps
    flops = count(size, settings.lora.rank)
    pairs = settings.prompts_per_rollout * (steps - settings.first_step - last_steps(shape))
    ours = batch_flops(shape, settings, pairs, steps=steps)
    sampling = sum(value for name, value in ours.items() if name.startswith("rollout"))
    return sum(ours.values()), sampling + 4 * pairs * (flops.network + flops.network_train)
