"""How the embedded default was made."""

from dataclasses import dataclass

from spo.world.opinion import Opinion


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    # autoencoder
    vae_channels: tuple[int, ...] = (8, 16, 32, 64)
    latent_channels: int = 8
    vae_steps: int = 3200
    vae_batch: int = 16
    vae_rate: float = 1.5e-3
    kl_weight: float = 1e-4
    # CLIP: pictures and prompts
    clip_steps: int = 1500
    clip_batch: int = 64
    clip_rate: float = 2e-3
    # text encoder and UNet
    latents: int = 24_000
    unet_cycles: tuple[tuple[int, float], ...] = ((6000, 2e-3), (2800, 1.2e-3), (5000, 1.2e-3), (5000, 1.2e-3))  # rates
    unet_batch: int = 64
    # preference pairs
    pictures_per_prompt: int = 8
    chunk: int = 144
    share: float = 0.25  # of finish in the variance of the opinion's utility
    temperature: float = 0.3  # of the opinion's logistic error, in standard deviations of utility
    tie: float = 0.1
    # preference pairs with labels like people's (docs/calibration.md); the same labels teach their preference model
    people_pictures: int = 12  # a prompt, by the base itself
    people_share: float = 0.03
    people_temperature: float = 0.48
    people_tie: float = 0.16
    people_content: tuple[tuple[str, float], ...] = (("alignment", 0.5), ("subject", 0.5))
    label_steps: int = 200  # held-out accuracy falls from then on
    label_rate: float = 3e-4
    # the preference model: sight, then preferences
    tower: tuple[int, int] = (96, 4)  # width and layers of the vision tower
    sight_pictures: int = 12_288
    sight_steps: int = 4000
    sight_batch: int = 96
    sight_rate: float = 2e-3
    lessons_per_prompt: int = 22  # further pictures of the training prompts
    preference_steps: int = 2700
    preference_prompts: int = 12  # a step, with 8 pictures each
    preference_rate: float = 1e-3
    # flow model
    flow_latents: int = 96_000
    flow_steps: int = 10_500
    flow_rate: float = 4e-3
    flow_batch: int = 256
    # figures of the model card
    scored: int = 288

    @property
    def opinion(self) -> Opinion:
        return Opinion(self.share, self.temperature, self.tie)

    @property
    def people(self) -> Opinion:
        return Opinion(self.people_share, self.people_temperature, self.people_tie, dict(self.people_content))


RECIPE = Recipe()
