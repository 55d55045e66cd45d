"""What one switch alone changes: parts of SPO timed without it and with it, in turns, on SD v1.5's shape.

sample    the policy's guided prediction of all candidates of a batch, without gradients
update    policy forward, reference forward and backward of as many pairs as are in memory at a time
decode    the VAE, of all candidates
judge     the preference model, on all candidates
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_bench import Bench, Meter
from bench.systems import System, attach_lora
from spo.core.types import Pairs
from spo.methods.spo import Spo
from spo.models.load import compile_blocks
from spo.models.merging import merged_adapter
from spo.preference.score import PreferenceScorer

Call = Callable[[], object]
TURNS = 3
Trial = tuple[str, Call, AbstractContextManager[Any]]  # a label, what to time, and what stands around it


class Parts:
    """SPO's parts on random inputs, ready to be called."""

    def __init__(self, system: System):
        attach_lora(system)
        settings, self.policy = system.settings, system.policy
        self.scorer = PreferenceScorer(system.preference, device=self.policy.device)
        self.method = Spo(settings, self.policy, self.scorer, system.prompts)
        self.generator = torch.Generator(self.policy.device).manual_seed(0)
        n = len(system.prompts) * settings.candidates
        self.latents = self._normal(n)
        self.t = self.policy.timesteps[settings.first_step].repeat(n)
        self.cond = self.policy.encode(system.prompts).repeat(settings.candidates)
        self.text = self.scorer.encode(system.prompts).repeat(settings.candidates, 1)
        side = self.policy.latent_shape[-1] * self.policy.pipeline.vae_scale_factor
        self.images = torch.rand(n, 3, side, side, generator=self.generator, device=self.policy.device)
        m = min(n, settings.micro_batch_size or settings.batch_size)
        t_prev = self.policy.timesteps[settings.first_step + 1].repeat(m)
        rows = torch.arange(m, device=self.policy.device)
        x_prev = torch.stack([self._normal(m), self._normal(m)], dim=1)
        self.pairs = Pairs(self._normal(m)[:, None], x_prev, self.t[:m], t_prev, self.cond[rows], self.t[:m].float())

    @torch.no_grad()
    def sample(self) -> Tensor:
        return self.policy.predict(self.latents, self.t, self.cond)

    def update(self) -> None:
        self.method.loss(self.pairs).value.backward()
        for parameter in self.policy.parameters():
            parameter.grad = None

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.policy.decode(self.latents)

    def judge(self) -> Tensor:
        return self.scorer(self.images, self.text, torch.tensor(int(self.t[0])))

    def _normal(self, n: int) -> Tensor:
        shape = (n, *self.policy.latent_shape)
        return torch.randn(shape, generator=self.generator, device=self.policy.device)


def switch(bench: Bench, figures: dict[str, Any], *, name: str) -> None:
    """Time a switch's parts without it and with it; the system is as before afterwards, but for what is compiled."""
    system = bench.system("sd15")
    try:
        SWITCHES[name](Parts(system), bench, figures)
    finally:
        if getattr(system.policy.unet, "peft_config", None):
            system.policy.unet.unload_lora()


def in_turns(bench: Bench, figures: dict[str, Any], trials: Iterable[Trial], *, turns: int = TURNS) -> None:
    """Time trials by turns; of each its median seconds, its ratio to the first of the same call's name, most bytes.

    Each is called once before it is timed, within what stands around it. A trial that fails is noted, and no more.
    """
    found: dict[str, dict[str, Any]] = figures.setdefault("trials", {})
    first: float | None = None
    for label, call, around in trials:
        bench.deadline.check()
        try:
            with around:
                with Meter(bench.device) as first_call:
                    call()
                runs = []
                for _ in range(turns if bench.full else 1):
                    with Meter(bench.device) as meter:
                        call()
                    runs.append(meter.seconds)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            found[label] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            bench.tidy()
            continue
        seconds = statistics.median(runs)
        first = seconds if first is None else first
        found[label] = {"seconds": seconds, "times_faster": first / max(seconds, 1e-9), "peak_bytes": meter.peak_bytes}
        found[label]["first_call_seconds"] = first_call.seconds


def with_and_without(
    bench: Bench, figures: dict[str, Any], parts: Parts, calls: Iterable[str], label: str, make: Callable[[], Any]
) -> None:
    """Each call as it is, then under `make()`, then as it is again."""
    for call in calls:
        trials: list[Trial] = [
            (call, getattr(parts, call), nullcontext()),
            (f"{call}, {label}", getattr(parts, call), make()),
            (f"{call}, again", getattr(parts, call), nullcontext()),
        ]
        in_turns(bench, figures, trials)


def dtype(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """UNet and VAE in the other half precision; on a CPU, where they are in float32, in bfloat16."""
    other = torch.float16 if bench.full else torch.bfloat16
    label = str(other).removeprefix("torch.")
    figures["base"] = str(parts.policy.dtype).removeprefix("torch.")
    with_and_without(bench, figures, parts, ("sample", "update", "decode"), label, lambda: cast(parts, other))


def tf32(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """TF32 in float32's products: of the preference model, and of what else is in float32."""
    with_and_without(bench, figures, parts, ("judge", "update"), "TF32", float32_precision)
    half = torch.bfloat16
    autocast = torch.autocast(bench.device.type, half)
    in_turns(bench, figures, [("judge", parts.judge, nullcontext()), ("judge, bfloat16", parts.judge, autocast)])


def channels_last(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """Convolutions are in channels-last order; the switch takes that away."""
    calls = ("sample", "update", "decode")
    with_and_without(bench, figures, parts, calls, "channels first", lambda: channels_first(parts))


def compiled(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """model.compile: the UNet's transformer blocks; the system is dropped afterwards, for it stays compiled."""
    calls = [(name, getattr(parts, name)) for name in ("sample", "update")]
    for name, call in calls:
        in_turns(bench, figures, [(name, call, nullcontext())])
    try:
        if bench.full:
            compile_blocks(parts.policy.unet)
        else:  # without a C++ compiler, and in a second
            parts.policy.unet.compile_repeated_blocks(dynamic=False, backend="eager")
        for name, call in calls:
            in_turns(bench, figures, [(f"{name}, compiled", call, nullcontext())])
            plain, new = (figures["trials"].get(label, {}) for label in (name, f"{name}, compiled"))
            if "seconds" in plain and "seconds" in new:
                new["times_faster"] = plain["seconds"] / max(new["seconds"], 1e-9)
    finally:
        bench.drop()
        torch._dynamo.reset()


def fused_adamw(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """One step of AdamW over the LoRA and over all of the preference model, fused and not; no weight changes."""
    for name, weights in (
        ("LoRA", parts.policy.parameters()),
        ("preference model", list(parts.scorer.model.parameters())),
    ):
        trials = []
        for label, fused in ((f"{name}, AdamW", False), (f"{name}, fused AdamW", True)):
            optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=fused)
            trials.append((label, optimizer.step, gradients(weights)))
            in_turns(bench, figures, trials[-1:])
            del optimizer, trials[-1:]
        plain, new = (figures["trials"][f"{name}, {kind}"] for kind in ("AdamW", "fused AdamW"))
        if "seconds" in plain and "seconds" in new:
            new["times_faster"] = plain["seconds"] / max(new["seconds"], 1e-9)


def checkpointing(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """model.gradient_checkpointing: an update's time for its memory."""
    make = lambda: checkpointed(parts.policy.unet)  # noqa: E731
    with_and_without(bench, figures, parts, ("update",), "gradient checkpointing", make)


def merged(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """The adapter added into the weights while pairs are sampled; in half precision we do not, for it rounds them."""
    with_and_without(bench, figures, parts, ("sample",), "merged adapter", lambda: merged_adapter(parts.policy.unet))
    in_turns(bench, figures, [("sample, adapter off", parts.sample, parts.policy.reference())])


def slices(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """How many samples the UNet, and how many images the VAE, take at a time without gradients."""
    policy, n = parts.policy, len(parts.latents)
    for call, name, own in (
        (parts.sample, "unet_batch_size", policy.unet_batch_size),
        (parts.decode, "vae_batch_size", policy.vae_batch_size),
    ):
        most = 2 * n if name.startswith("unet") else n
        sizes = sorted({min(most, size) for size in (own // 8, own // 4, own // 2, 2 * own, 4 * own) if size > 0})
        trials: list[Trial] = [(f"{name} {own} (ours)", call, nullcontext())]
        trials += [(f"{name} {size}", call, changed(policy, name, size)) for size in sizes if size != own]
        in_turns(bench, figures, trials)


SWITCHES: dict[str, Callable[[Parts, Bench, dict[str, Any]], None]] = {
    "dtype": dtype,
    "tf32": tf32,
    "channels-last": channels_last,
    "fused-adamw": fused_adamw,
    "checkpointing": checkpointing,
    "merged": merged,
    "slices": slices,
    "compile": compiled,
}


@contextmanager
def cast(parts: Parts, dtype: torch.dtype) -> Iterator[None]:
    """The frozen weights of UNet and VAE in another dtype; the very tensors of before stand again afterwards."""
    policy = parts.policy
    before, frozen = policy.dtype, _frozen(policy.unet) + _frozen(policy.vae)
    originals = [weight.data for weight in frozen]
    try:
        for weight in frozen:
            weight.data = weight.data.to(dtype)
        policy.dtype = dtype
        yield
    finally:
        policy.dtype = before
        for weight, original in zip(frozen, originals, strict=True):
            weight.data = original


@contextmanager
def channels_first(parts: Parts) -> Iterator[None]:
    """Frozen weights in the order of rows; afterwards as before."""
    frozen = _frozen(parts.policy.unet) + _frozen(parts.policy.vae)
    originals = [weight.data for weight in frozen]
    try:
        for weight in frozen:
            weight.data = weight.data.contiguous()
        yield
    finally:
        for weight, original in zip(frozen, originals, strict=True):
            weight.data = original


@contextmanager
def float32_precision() -> Iterator[None]:
    """TF32 in matrix products; cuDNN's convolutions have it anyway."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def checkpointed(unet: Any) -> Iterator[None]:
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


@contextmanager
def gradients(weights: list[nn.Parameter]) -> Iterator[None]:
    """Every weight has a gradient of zeros."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    try:
        yield
    finally:
        for weight in weights:
            weight.grad = None


@contextmanager
def changed(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _frozen(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if not weight.requires_grad]
