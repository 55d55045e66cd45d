"""The cards of the embedded default's models and data, with the figures of the run that made them."""

from collections.abc import Mapping

from spo.world.pretraining.calibration import agreement
from spo.world.pretraining.pairs import Pool
from spo.world.pretraining.recipe import Recipe

MADE = "Made from random weights and drawn pictures; nothing was downloaded."


def base(recipe: Recipe, figures: Mapping[str, float]) -> str:
    """Model card of data/base/tiny."""
    *first, last = [str(steps) for steps, _ in recipe.unet_cycles]
    steps = f"{', '.join(first)} and {last}"
    return f"""# The embedded default's base model

A diffusion model of the drawn world (`spo/world/scenes.py`) in the format of Stable Diffusion v1.5:
`StableDiffusionPipeline.from_pretrained("data/base/tiny")` makes 64 px pictures of prompts such as
"a small red cross on a white background". Apache-2.0. {MADE}

- Autoencoder: AutoencoderKL, f8, {recipe.latent_channels} latent channels, {recipe.vae_steps} steps of
  {recipe.vae_batch} pictures.
- Text encoder: the text tower of a CLIP taught for {recipe.clip_steps} steps which prompt belongs to which
  picture, then trained on with the UNet.
- UNet: 1.1M parameters, {steps} steps of {recipe.unet_batch} latents out of {recipe.latents}, moving
  average of the weights. Half of the pictures it learns from are made with care (`scenes.draw_care`), so chance decides
  how well its own are made.

The oracle's means over {recipe.scored} pictures (20 DDIM steps, eta 0, guidance 3):

{_table(figures)}
"""


def flow(recipe: Recipe, figures: Mapping[str, float]) -> str:
    """Model card of data/base/tiny-flow."""
    return f"""# The embedded default's flow model

A rectified flow of the drawn world (`spo/world/scenes.py`) in the format of Stable Diffusion 3, without T5. In plain
diffusers:

```python
pipe = StableDiffusion3Pipeline.from_pretrained("data/base/tiny-flow", text_encoder_3=None, tokenizer_3=None)
pipe("a small red cross", height=64, width=64, num_inference_steps=20, guidance_scale=3, max_sequence_length=1)
```

`max_sequence_length=1` belongs to the model: in T5's place it learned with one zero token. Apache-2.0. {MADE}

- Autoencoder and first text encoder: those of `data/base/tiny`. Second text encoder: the text tower of
  `data/base/tiny-preference`. Both text towers are scaled so that the hidden states that SD3 reads have a standard
  deviation of about 1. All three were frozen.
- Transformer: SD3Transformer2DModel, 1.6M parameters, {recipe.flow_steps} steps of {recipe.flow_batch} latents out of
  {recipe.flow_latents}, sigma logit-normal, moving average of the weights, stored in float16. The pictures it learns
  from are drawn like those of `data/base/tiny`.

The oracle's means over {recipe.scored} pictures (20 Euler steps, guidance 3):

{_table(figures)}
"""


def _table(figures: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    return f"| score | mean |\n|---|---|\n{rows}"


def preference(recipe: Recipe, accuracy: Mapping[str, float]) -> str:
    """Model card of data/base/tiny-preference."""
    return f"""# The embedded default's preference model to start from

A `CLIPModel` of 0.57M parameters, what PickScore is to the real profiles: taught which prompt a drawn picture belongs
to and what flaws it has ({recipe.sight_steps} steps), then preferences on clean pictures of the training prompts
({recipe.preference_steps} steps): generated ones (those of the shipped pairs, and {recipe.lessons_per_prompt} more a
prompt by the base) and drawn ones. Labels are made by the opinion of the shipped pairs. Apache-2.0. {MADE}

It agrees with {accuracy["accuracy"]:.3f} of the {accuracy["pairs"]} decided labels of held-out prompts; the labels
themselves are noisy (see `data/preferences/tiny`).
"""


def pairs(recipe: Recipe, pool: Pool) -> str:
    """Data card of data/preferences/tiny."""
    ties = (pool.label == 0.5).float().mean().item()
    return f"""# The embedded default's preference pairs

{len(pool.label)} pairs of {len(pool.pictures)} generated 64 px pictures for {len(set(pool.prompts))} prompts, in
Pick-a-Pic's layout: `caption, jpg_0, jpg_1, label_0, label_1`. Apache-2.0. {MADE}

The pictures come from the base, at guidance 1.5 to 7.5, 8 to 20 steps, eta 0 or 1, {recipe.pictures_per_prompt} a
prompt; each is compared with the next one of its prompt. One generic opinion labels them
(`spo/world/opinion.py`), in which

- {recipe.share:.0%} of the utility's variance is owed to finish (vivid colour, crisp edges, no blotches), the rest
  to alignment with the prompt and to layout (how well centred the object is);
- a logistic error of temperature {recipe.temperature} (in standard deviations of utility) is added;
- a difference within {recipe.tie} is a tie: {ties:.1%} of the pairs.

The share is an assumption, not measured on people: SPO's paper argues that generic labels are dominated by content
and layout. Change it in `spo/world/pretraining/recipe.py` and run `python -m spo pretrain`.
"""


def people_preference(recipe: Recipe, accuracy: Mapping[str, float]) -> str:
    """Model card of data/base/tiny-people-preference."""
    return f"""# The preference model of profile tiny-people to start from

A `CLIPModel` of 0.57M parameters, what PickScore is to the real profiles: taught which prompt a drawn picture belongs
to and what flaws it has ({recipe.sight_steps} steps), then the labels of `data/preferences/tiny-people` of the training
prompts, each label once given ({recipe.label_steps} steps), and no other labels. Apache-2.0. {MADE}

It agrees with {accuracy["accuracy"]:.3f} of the {accuracy["pairs"]} decided labels of held-out prompts. The opinion
behind the labels, without its noise, agrees with .718 of all decided labels.
"""


def people(recipe: Recipe, pool: Pool) -> str:
    """Data card of data/preferences/tiny-people."""
    figures = agreement(pool, recipe.people)
    return f"""# Preference pairs with labels like people's

{len(pool.label)} labelled pairs of {len(pool.pictures)} generated 64 px pictures for {len(set(pool.prompts))} prompts.
A row holds a prompt's pictures and all comparisons of two of them: `caption, images, comparisons` (docs/data.md).
Apache-2.0. {MADE}

The pictures come from the base itself, at guidance 1.5 to 7.5, 8 to 20 steps, eta 0 or 1, {recipe.people_pictures} a
prompt; those without a recognisable object are left out. An opinion labels each pair once (`spo/world/opinion.py`).
{recipe.people_share:.0%} of its variance is finish; the rest is alignment with the prompt and the subject, a large
object on a light background. It was set so that the labels agree with the oracle's scores about as far as those of
Pick-a-Pic agree with the scores that are used for it, before any model was aligned (docs/calibration.md):

| share of decided pairs whose preferred picture scores higher | |
|---|---|
| aesthetic score | {figures["aesthetic"]:.3f} |
| alignment score | {figures["alignment"]:.3f} |
| the opinion without its noise | {figures["opinion"]:.3f} |
| ties, of all pairs | {figures["ties"]:.3f} |
"""
