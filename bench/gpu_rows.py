"""What `bench.gpu` measures, a row each, in the order of value; nothing is imported before its row runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from spo.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    call: "module:function" of function(bench, figures, **options), which fills `figures` as it goes
    least: seconds at full size below which it is not begun
    """

    name: str
    call: str
    least: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def measure(self, bench: Any, figures: dict[str, Any]) -> None:
        module, _, function = self.call.partition(":")
        getattr(import_module(module), function)(bench, figures, **self.options)


def _switch(name: str, least: float) -> Row:
    return Row(f"switch-{name}", "bench.gpu_switches:switch", least, {"name": name})


ROWS = (
    Row("rates", "bench.gpu_parts:rates", 2),
    Row("spo-sd15", "bench.gpu_spo:duel", 130, {"family": "sd15"}),
    Row("where-sd15", "bench.gpu_spo:where", 42, {"family": "sd15"}),
    Row("kinds-sd15", "bench.gpu_kinds:kinds", 25, {"family": "sd15"}),
    *(Row(f"preference-{n}", "bench.gpu_parts:preference_step", 4, {"num_pairs": n}) for n in (1, 4, 16)),
    Row("busy", "bench.gpu_busy:busy", 10),
    _switch("autocast", 6),
    _switch("tf32", 7),
    _switch("attention", 9),
    _switch("fused-adamw", 4),
    _switch("channels-last", 9),
    _switch("checkpointing", 8),
    _switch("slices", 8),
    _switch("cudnn-benchmark", 20),
    _switch("merged", 4),
    _switch("dtype", 9),
    Row("check", "bench.gpu_spo:check", 15),
    Row("where-sd35", "bench.gpu_spo:where", 35, {"family": "sd35"}),
    Row("where-flux", "bench.gpu_spo:where", 50, {"family": "flux"}),
    Row("spo-sdxl", "bench.gpu_spo:duel", 190, {"family": "sdxl"}),
    Row("where-sdxl", "bench.gpu_spo:where", 45, {"family": "sdxl"}),
    Row("kinds-sdxl", "bench.gpu_kinds:kinds", 45, {"family": "sdxl"}),
    Row("compiled-sd15", "bench.gpu_spo:compiled", 300, {"family": "sd15"}),  # the last two take longest
    _switch("compile", 200),
)


def chosen(only: Sequence[str] | None) -> list[Row]:
    """The rows of these names, or of names that begin so: `switch` is every switch-...; all of them for None."""
    if only is None:
        return list(ROWS)
    found = {name: [row for row in ROWS if row.name == name or row.name.startswith(f"{name}-")] for name in only}
    unknown = [name for name, rows in found.items() if not rows]
    if unknown:
        raise ConfigError(f"--only: there is no row {', '.join(unknown)}; rows: {' '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if any(row in rows for rows in found.values())]
