"""The embedded default's diffusion model: text encoder and UNet, taught on well and badly made pictures alike.

So it follows its prompts, but chance decides how well a picture is made, as with Stable Diffusion before alignment.
The error of the predicted noise is weighted by min(1 / alpha_bar, 10), the clipped weight of v-prediction: noisy steps,
which decide the shapes, would otherwise count for little.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from spo.world.pretraining.clip import token_ids
from spo.world.pretraining.updates import updates
from spo.world.scenes import all_scenes, draw_attributes, draw_care, render

PROMPT_DROPOUT = 0.1  # for classifier-free guidance
WEIGHT_LIMIT = 10.0


def new_unet(latent_channels: int) -> UNet2DConditionModel:
    """1.1 million parameters on 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def draw_latents(vae: AutoencoderKL, n: int, generator: Generator, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Latents (n, c, 8, 8) of random pictures, and the index (n,) of each one's scene in `all_scenes()`."""
    scenes = all_scenes()
    chosen = torch.randint(len(scenes), (n,), generator=generator)
    latents = []
    for part in chosen.split(batch_size):
        attributes = draw_attributes([scenes[i] for i in part.tolist()], generator)
        pictures = render(attributes, draw_care(len(part), generator), generator)
        latents.append(vae.encode(2 * pictures - 1).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(latents), chosen


def draw_rows(scene_index: Tensor, n: int, generator: Generator, *, empty: int) -> tuple[Tensor, Tensor]:
    """n random latents, and the index of each one's prompt: its scene's, or now and then `empty`."""
    row = torch.randint(len(scene_index), (n,), generator=generator)
    prompt = scene_index[row].clone()
    prompt[torch.rand(n, generator=generator) < PROMPT_DROPOUT] = empty
    return row, prompt


class Average:
    """Exponential moving average of the weights of several modules."""

    def __init__(self, *modules: nn.Module, decay: float):
        self.live = modules
        self.decay = decay
        self.modules = [copy.deepcopy(module).eval().requires_grad_(False) for module in modules]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, live in zip(self.modules, self.live, strict=True):
            torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)

    def apply(self) -> None:
        """Set the live weights to the average."""
        for average, live in zip(self.modules, self.live, strict=True):
            live.load_state_dict(average.state_dict())


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    scene_index: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: Generator,
) -> Iterator[dict[str, float]]:
    """Train in place; yields each step's loss. After the last one the weights are their running average."""
    alpha_bar = new_scheduler().alphas_cumprod
    weights = (1 / alpha_bar).clamp(max=WEIGHT_LIMIT)
    weights /= weights.mean()
    ids = token_ids(tokenizer, [*(scene.prompt for scene in all_scenes()), ""])
    empty = len(ids) - 1
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    unet.to(memory_format=torch.channels_last)  # a quarter less time on a CPU
    average = Average(unet, text_encoder, decay=0.998)
    for step, update in enumerate(updates(parameters, steps, learning_rate, warm_up=100, floor=0.03)):
        row, prompt = draw_rows(scene_index, batch_size, generator, empty=empty)
        t = torch.randint(len(alpha_bar), (batch_size,), generator=generator)
        noise = torch.randn(latents[row].shape, generator=generator)
        signal = alpha_bar[t].view(-1, 1, 1, 1)
        x_t = signal.sqrt() * latents[row] + (1 - signal).sqrt() * noise
        predicted = unet(x_t, t, text_encoder(ids[prompt]).last_hidden_state).sample
        loss = (weights[t] * (predicted - noise).pow(2).mean(dim=(1, 2, 3))).mean()
        update(loss)
        average.update(step)
        yield {"loss": loss.item()}
    average.apply()


def save_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Save like any Stable Diffusion v1.5 repository."""
    StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
