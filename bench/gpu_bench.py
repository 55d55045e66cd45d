"""What the rows of `bench.gpu` share: the device, the system in memory, the device's rates, and how they measure."""

import gc
import platform
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu_run import Deadline
from bench.measure import clock, machine
from spo.errors import ConfigError

if TYPE_CHECKING:
    from bench.systems import System
    from spo.models.latent_diffusion import LatentDiffusion

SIZES = {  # names in bench.systems.SHAPES, by family
    "full": {"sd15": "sd15", "sdxl": "sdxl", "sd35": "sd35", "flux": "flux"},
    "small": {"sd15": "mini", "sdxl": "mini-sdxl", "sd35": "mini-sd35", "flux": "mini-flux"},
}


class Bench:
    """One run of the command. It holds one system at a time, so that a row's peak of memory is its own."""

    def __init__(self, device: str, size: str, deadline: Deadline):
        if device == "cpu" and size == "full":
            raise ConfigError("--device cpu takes --size small; the full size would take hours")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device; `--device cpu --size small` tries everything out without one")
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.size = size
        self.full = size == "full"
        self.deadline = deadline
        self.figures: dict[str, dict[str, Any]] = {}  # of the rows so far
        self._held: tuple[str, System] | None = None

    def shape(self, family: str) -> str:
        """The name in bench.systems.SHAPES that stands for a family."""
        return SIZES[self.size][family]

    def system(self, family: str) -> "System":
        """The family's system, without a LoRA; made on the device, and kept until another family is asked for."""
        from bench.systems import make_system
        from spo.runtime.libraries import set_up_libraries

        name = self.shape(family)
        if self._held is None or self._held[0] != name:
            self.drop()
            set_up_libraries()
            self._held = name, make_system(name, self.device)
        return self._held[1]

    def drop(self) -> None:
        """Let go of the system in memory."""
        self._held = None
        self.tidy()

    def tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def compile(self, policy: "LatentDiffusion") -> None:
        """What model.compile does; in small the network is traced alone, which takes no C++ compiler."""
        from bench.systems import compile_policy
        from spo.models.load import VARIANTS

        if self.full:
            compile_policy(policy)
        else:
            torch._dynamo.config.recompile_limit = VARIANTS
            policy.network.module.compile_repeated_blocks(dynamic=False, backend="eager")

    def drop_compiled(self) -> None:
        """Let go of the system, which stays compiled, and of the compiled code."""
        self.drop()
        torch._dynamo.reset()

    def rates(self) -> dict[str, float]:
        """What the floor is made of: FLOP/s of a large product and bytes/s of a large copy; measured once."""
        if "product_flops_a_second" not in self.figures.get("rates", {}):
            from bench.gpu_parts import rates

            self.figures["rates"] = {}
            rates(self, self.figures["rates"])
        return self.figures["rates"]


class Meter:
    """Seconds of a block, and on a GPU the most bytes in use within it; a CPU's, which one process shares, are None."""

    def __init__(self, device: torch.device):
        self._device = device
        self.peak_bytes: int | None = None

    def __enter__(self) -> "Meter":
        self._start = clock(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = clock(self._device) - self._start
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)


def in_use(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that tensors take."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def facts(bench: Bench) -> dict[str, Any]:
    """What the figures are of: machine, versions, commit, time."""
    found: dict[str, Any] = {"device": bench.device.type, "machine": machine(bench.device), "size": bench.size}
    found |= {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit()}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {"cuda": torch.version.cuda, "memory_bytes": properties.total_memory}
    return {**found, "started": datetime.now(UTC).isoformat(timespec="seconds")}


def _commit() -> str | None:
    """Where git is there and knows."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
