"""The device's own rates, and one step of training the preference model."""

from typing import Any, Literal

import torch

from bench.gpu_bench import Bench, Meter, in_use
from bench.measure import clock, matmul_rate

ADAMW_PASSES = 7  # over float32 weights: weight, gradient and both moments are read, all but the gradient written


def rates(bench: Bench, figures: dict[str, Any]) -> None:
    """FLOP/s of a large product, bfloat16 on a GPU, and bytes/s, read and written, of a large copy."""
    cuda = bench.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    figures["product_dtype"] = str(dtype).removeprefix("torch.")
    figures["product_flops_a_second"] = matmul_rate(bench.device, dtype)
    figures["copy_bytes_a_second"] = copy_rate(bench.device, 2**32 if cuda else 2**25)
    figures["seconds_a_small_operation"] = launch_seconds(bench.device)


def copy_rate(device: torch.device, num_bytes: int, *, repeats: int = 10) -> float:
    """Bytes/s, each counted as it is read and as it is written, of a copy of `num_bytes` on the device."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        start = clock(device)
        target.copy_(source)
        best = min(best, clock(device) - start)
    return 2 * num_bytes / max(best, 1e-9)


def launch_seconds(device: torch.device, *, num: int = 2000, repeats: int = 5) -> float:
    """Seconds that one operation on a few numbers takes: on a GPU its launch, which the CPU's speed decides."""
    values = torch.zeros(8, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = clock(device)
        for _ in range(num):
            values.add_(1.0)
        best = min(best, clock(device) - start)
    return best / num


def preference_step(bench: Bench, figures: dict[str, Any], *, num_pairs: int) -> None:
    """One step of train_preference on random latents: noise, prediction, VAE, and all of CLIP trains.

    The preference model's numbers are others afterwards, which no later row's time depends on.
    """
    from spo.config import PixelPreferenceConfig
    from spo.core.types import LabelledPairs
    from spo.training.preference import StepAwareTraining

    system = bench.system("sd15")
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if bench.full else "float32"
    config = PixelPreferenceConfig(start_from="random weights", batch_size=num_pairs, dtype=dtype)
    figures |= {"pairs": num_pairs, "dtype": dtype, "start_bytes": in_use(bench.device)}
    training = StepAwareTraining(system.policy, system.preference, config)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(num_pairs, 2, *system.policy.latent_shape, generator=generator)
    label = torch.tensor([[1.0, 0.0]]).expand(num_pairs, -1)
    captions = [f"a picture of number {i}" for i in range(num_pairs)]
    pairs = LabelledPairs.of(latents, label, torch.ones(num_pairs), captions)
    try:
        seconds, peaks = [], []
        for step in range(4 if bench.full else 2):
            with Meter(bench.device) as meter:
                training.step(pairs, step, seed=0)
            seconds.append(meter.seconds)
            peaks.append(meter.peak_bytes)
            best = min(seconds[1:] or seconds)  # the first one makes the optimizer's state, and wakes the kernels
            figures |= {"steps": len(seconds), "seconds": best, "seconds_a_pair": best / num_pairs}
            figures["peak_bytes"] = peaks[-1]
    finally:
        training.model.zero_grad(set_to_none=True)
    flops, num_bytes = step_cost(bench.shape("sd15"), num_pairs)
    rate = bench.rates()
    figures["floor_seconds"] = flops / rate["product_flops_a_second"] + num_bytes / rate["copy_bytes_a_second"]
    figures["share_of_floor"] = figures["floor_seconds"] / figures["seconds"]


def step_cost(shape_name: str, num_pairs: int) -> tuple[float, float]:
    """Operations of one step, and the bytes that its optimizer moves; a backward pass counts as two forward ones."""
    from bench.flops import count
    from bench.systems import SHAPES, TOKENS, make_clip

    flops = count(shape_name, 4)
    with torch.device("meta"):
        clip = make_clip(SHAPES[shape_name])
    text = 2 * TOKENS * sum(weight.numel() for weight in clip.clip.text_model.encoder.parameters())
    image = 2 * (2 * flops.network + flops.vae_decode + 3 * flops.clip_image)  # two images a pair, guided
    weights = 4 * sum(weight.numel() for weight in clip.parameters())
    return num_pairs * (image + 3 * text), ADAMW_PASSES * weights
