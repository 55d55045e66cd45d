"""What one switch alone changes: parts of SPO timed without it and with it, in turns, on SD v1.5's shape.

sample    the policy's guided prediction of all candidates of a batch, without gradients
update    policy forward, reference forward and backward of as many pairs as are in memory at a time
decode    the VAE, of all candidates
score     the preference model, on all candidates
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bench import gpu_around as around
from bench.gpu_bench import Bench, Meter
from bench.systems import System, attach_lora
from spo.core.types import Pairs
from spo.methods.spo import Spo
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
        side = self.policy.latent_shape[-1] * self.policy.network.pipeline.vae_scale_factor
        self.images = torch.rand(n, 3, side, side, generator=self.generator, device=self.policy.device)
        m = min(n, settings.micro_batch_size or settings.batch_size)
        t_prev = self.policy.timesteps[settings.first_step + 1].repeat(m)
        rows = torch.arange(m, device=self.policy.device)
        x_prev = torch.stack([self._normal(m), self._normal(m)], dim=1)
        margin, cond = self.t[:m].float(), self.cond[rows]
        x_t = self._normal(m)[:, None]
        self.pairs = Pairs(x_t=x_t, x_prev=x_prev, t=self.t[:m], t_prev=t_prev, cond=cond, margin=margin)

    @torch.no_grad()
    def sample(self) -> Tensor:
        return self.policy.predict(self.latents, self.t, self.cond)

    def update(self) -> None:
        self.method.loss(self.pairs).value.backward()
        for parameter in self.policy.network.parameters():
            parameter.grad = None

    @torch.no_grad()
    def decode(self) -> Tensor:
        return self.policy.decode(self.latents)

    def score(self) -> Tensor:
        return self.scorer.score_images(self.images, self.text, torch.tensor(int(self.t[0])))

    def _normal(self, n: int) -> Tensor:
        shape = (n, *self.policy.latent_shape)
        return torch.randn(shape, generator=self.generator, device=self.policy.device)


def switch(bench: Bench, figures: dict[str, Any], *, name: str) -> None:
    """Time a switch's parts without it and with it; the system is as before afterwards, but for what is compiled."""
    system = bench.system("sd15")
    try:
        SWITCHES[name](Parts(system), bench, figures)
    finally:
        if system.policy.network.has_adapter:
            system.policy.network.module.unload_lora()


def in_turns(bench: Bench, figures: dict[str, Any], trials: Iterable[Trial], *, turns: int = TURNS) -> None:
    """Time trials by turns; of each its median seconds, its ratio to the first of the same call's name, most bytes.

    Each is called once before it is timed, within what stands around it. A trial that fails is noted, and no more.
    """
    found: dict[str, dict[str, Any]] = figures.setdefault("trials", {})
    first: float | None = None
    for label, call, context in trials:
        try:
            with context:
                with Meter(bench.device) as first_call:
                    call()
                runs = []
                for _ in range(turns if bench.full else 1):
                    with Meter(bench.device) as meter:
                        call()
                    runs.append(meter.seconds)
        except (RuntimeError, ValueError) as error:  # what torch raises for a switch that this device lacks
            found[label] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            bench.tidy()
            continue
        seconds = statistics.median(runs)
        first = seconds if first is None else first
        found[label] = {
            "seconds": seconds,
            "times_faster": first / seconds if seconds else 1.0,
            "peak_bytes": meter.peak_bytes,
        }
        found[label]["first_call_seconds"] = first_call.seconds


def with_and_without(
    bench: Bench,
    figures: dict[str, Any],
    parts: Parts,
    calls: Iterable[str],
    switches: Mapping[str, Callable[[], AbstractContextManager[Any]]],
) -> None:
    """Each call as it is, then with each switch alone, then as it is again."""
    for name in calls:
        call = getattr(parts, name)
        trials: list[Trial] = [(name, call, nullcontext())]
        trials += [(f"{name}, {label}", call, make()) for label, make in switches.items()]
        in_turns(bench, figures, [*trials, (f"{name}, again", call, nullcontext())])


def dtype(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """UNet and VAE in the other half precision; on a CPU, where they are in float32, in bfloat16."""
    other = torch.float16 if bench.full else torch.bfloat16
    figures["base"] = name_of(parts.policy.dtype)
    switches = {name_of(other): lambda: around.cast(parts.policy, other)}
    with_and_without(bench, figures, parts, ("sample", "update", "decode"), switches)


def tf32(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """Float32 products use TF32; the switch takes that away."""
    with_and_without(bench, figures, parts, ("score", "update"), {"no TF32": around.without_tf32})


def attention(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """Attention without cuDNN; the switch allows it."""
    with_and_without(bench, figures, parts, ("sample", "update"), {"cuDNN": around.cudnn_attention})


def channels_last(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """Convolutions are in the order of `spo.models.load.order_for_convolutions`; the switch: channels first."""
    switches = {"channels first": lambda: around.channels_first(parts.policy)}
    with_and_without(bench, figures, parts, ("sample", "update", "decode"), switches)


def autocast(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """Below float32 only the LoRA's weights are cast; the switch: autocast, and peft's casts of the inputs."""
    switches = {"autocast": lambda: around.autocast(parts.policy)}
    with_and_without(bench, figures, parts, ("sample", "update"), switches)


def cudnn_benchmark(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """cuDNN chooses the algorithm of a convolution by its own rules; the switch lets it try them."""
    with_and_without(bench, figures, parts, ("sample", "update", "decode"), {"tried": around.cudnn_benchmark})


def compiled(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """model.compile: the blocks of UNet and VAE; the system is dropped afterwards, for it stays compiled."""
    names = ("decode", "sample", "update") if bench.full else ("sample",)  # to trace an update takes a CPU ten seconds
    calls = {name: getattr(parts, name) for name in names}
    for name, call in calls.items():
        in_turns(bench, figures, [(name, call, nullcontext())])
    try:
        bench.compile(parts.policy)
        for name, call in calls.items():
            in_turns(bench, figures, [(f"{name}, compiled", call, nullcontext())])
            _compare(figures, name, f"{name}, compiled")
    finally:
        bench.drop_compiled()


def fused_adamw(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """One step of AdamW over the LoRA and over all of the preference model, fused and not; no weight changes."""
    for name, weights in (
        ("LoRA", parts.policy.network.parameters()),
        ("preference model", list(parts.scorer.model.parameters())),
    ):
        for kind, fused in (("AdamW", False), ("fused AdamW", True)):
            optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=fused)
            in_turns(bench, figures, [(f"{name}, {kind}", optimizer.step, around.gradients(weights))])
            del optimizer  # its moments are twice the weights
        _compare(figures, f"{name}, AdamW", f"{name}, fused AdamW")


def checkpointing(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """model.gradient_checkpointing: an update's time for its memory."""
    switches = {"gradient checkpointing": lambda: around.checkpointed(parts.policy.network.module)}
    with_and_without(bench, figures, parts, ("update",), switches)


def merged(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """The adapter added into the weights while pairs are sampled; not done in half precision, which would round it."""
    switches = {"merged adapter": lambda: around.merged(parts.policy), "adapter off": parts.policy.reference}
    with_and_without(bench, figures, parts, ("sample",), switches)


def slices(parts: Parts, bench: Bench, figures: dict[str, Any]) -> None:
    """How many samples the UNet, and how many images the VAE, take at a time without gradients."""
    policy, n = parts.policy, len(parts.latents)
    for call, owner, most in (("sample", policy.network, 2 * n), ("decode", policy.autoencoder, n)):
        own = min(owner.batch_size, most)
        sizes = sorted({min(most, size) for size in (own // 4, own // 2, 2 * own, 4 * own) if size} - {own})
        switches = {
            f"{size} at a time": lambda owner=owner, size=size: around.changed(owner, "batch_size", size)
            for size in sizes
        }
        figures[f"{call}_batch_size"] = own
        with_and_without(bench, figures, parts, (call,), switches)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compare(figures: dict[str, Any], old: str, new: str) -> None:
    """Say of a trial how much faster it is than another that was timed apart."""
    one, other = (figures["trials"].get(label, {}) for label in (old, new))
    if "seconds" in one and "seconds" in other:
        other["times_faster"] = one["seconds"] / max(other["seconds"], 1e-9)


SWITCHES: dict[str, Callable[[Parts, Bench, dict[str, Any]], None]] = {
    "autocast": autocast,
    "cudnn-benchmark": cudnn_benchmark,
    "dtype": dtype,
    "tf32": tf32,
    "attention": attention,
    "channels-last": channels_last,
    "fused-adamw": fused_adamw,
    "checkpointing": checkpointing,
    "merged": merged,
    "slices": slices,
    "compile": compiled,
}
