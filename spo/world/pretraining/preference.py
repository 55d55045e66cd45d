"""The embedded default's counterpart of PickScore: its CLIP, taught preferences on clean pictures.

First it learns to see which prompt a drawn picture belongs to and how it is finished; the world's prompts, unlike
captions of the web, say nothing of finish. Most of these pictures have been through the autoencoder, as all generated
ones have. Then groups of generated and drawn pictures of one prompt are compared, with the labels of
`spo/world/opinion.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from spo.core.losses import preference_loss
from spo.world.opinion import ALIGNED_AND_CENTRED, Opinion, combine
from spo.world.pretraining.clip import contrast, normalise, token_ids
from spo.world.pretraining.pairs import Pool
from spo.world.pretraining.recipe import Recipe
from spo.world.pretraining.updates import updates
from spo.world.scenes import Scene, draw_attributes, draw_care, draw_quality, render

SCHEDULE = {"warm_up": 50, "floor": 0.05, "weight_decay": 1e-2}
GROUP = 8  # pictures of one prompt that are compared with one another
OTHER = (0.1, 0.1, 0.35, 0.1)  # chance that a drawn picture differs from its prompt in size, colour, shape, background


@dataclass(frozen=True)
class Group:
    """Pictures (p * GROUP, 3, 64, 64) in [0, 1] of p prompts, and their utilities (p * GROUP,)."""

    pictures: Tensor
    prompts: list[str]  # p
    utility: Tensor


@dataclass(frozen=True)
class Stock:
    """Drawn pictures, from which the CLIP learns to see."""

    pictures: Tensor  # (n, 3, 64, 64) of 8 bits
    scene: Tensor  # (n,) index of the prompt's scene
    flaws: Tensor  # (n, 4) fade, softness, blotch and distance off centre, each of mean 0 and deviation 1


@torch.no_grad()
def draw_stock(
    vae: AutoencoderKL, scenes: Sequence[Scene], n: int, generator: Generator, *, batch_size: int = 512
) -> Stock:
    """Draw n pictures, three quarters of them through the autoencoder with a little noise on their latents."""
    chosen = torch.randint(len(scenes), (n,), generator=generator)
    pictures, flaws = [], []
    for part in chosen.split(batch_size):
        quality = draw_quality(len(part), generator)
        drawn = render(draw_attributes([scenes[i] for i in part.tolist()], generator), quality, generator)
        kept = len(part) // 4
        drawn[kept:] = reconstruct(vae, drawn[kept:], generator, noise=0.15)
        pictures.append((drawn * 255).round().byte())
        flaws.append(torch.cat([quality[:, :3], quality[:, 3:].norm(dim=1, keepdim=True)], dim=1))
    truth = torch.cat(flaws)
    return Stock(torch.cat(pictures), chosen, (truth - truth.mean(dim=0)) / truth.std(dim=0))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor, generator: Generator, *, noise: float = 0.0) -> Tensor:
    """Encode and decode pictures (n, 3, h, w) in [0, 1]; each latent gets noise of up to `noise` deviations."""
    latents = vae.encode(2 * pictures - 1).latent_dist.mean
    if noise:
        strength = noise * torch.rand(len(latents), 1, 1, 1, generator=generator)
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def train_sight(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    stock: Stock,
    scenes: Sequence[Scene],
    recipe: Recipe,
    generator: Generator,
) -> Iterator[dict[str, float]]:
    """Teach the CLIP prompts, and flaws through a head that is thrown away, in place."""
    head = nn.Linear(clip.config.vision_config.hidden_size, stock.flaws.shape[1])
    ids = token_ids(tokenizer, [scene.prompt for scene in scenes])
    parameters = [*clip.parameters(), *head.parameters()]
    for update in updates(parameters, recipe.sight_steps, recipe.sight_rate, **SCHEDULE):
        rows = torch.randint(len(stock.pictures), (recipe.sight_batch,), generator=generator)
        pictures = mirror(stock.pictures[rows] / 255, generator)
        seen = clip.vision_model(pixel_values=normalise(pictures)).pooler_output
        texts = clip.get_text_features(input_ids=ids[stock.scene[rows]]).pooler_output
        captions, right = contrast(clip.visual_projection(seen), texts, stock.scene[rows], clip.logit_scale.exp())
        unexplained = F.mse_loss(head(seen), stock.flaws[rows])
        update(captions + stock.flaws.shape[1] * unexplained)
        yield {"captions": captions.item(), "right": right.item(), "unexplained": unexplained.item()}


def mirror(pictures: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the pictures, chosen at random."""
    flipped = torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped, pictures.flip(-1), pictures)


def train_preference(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    draw: Sequence[Callable[[Generator], Group]],
    opinion: Opinion,
    recipe: Recipe,
    generator: Generator,
) -> Iterator[dict[str, float]]:
    """Teach the CLIP the labels of all pairs within groups, in place; the sources in `draw` take turns."""
    one, other = torch.triu_indices(GROUP, GROUP, 1)
    schedule = updates(list(clip.parameters()), recipe.preference_steps, recipe.preference_rate, **SCHEDULE)
    for number, update in enumerate(schedule):
        group = draw[number % len(draw)](generator)
        utility = group.utility.unflatten(0, (-1, GROUP))
        scores = score_groups(clip, tokenizer, mirror(group.pictures, generator), group.prompts)
        first = opinion.label(utility[:, one].flatten(), utility[:, other].flatten(), generator)
        pairs = torch.stack([scores[:, one].flatten(), scores[:, other].flatten()], dim=1)
        loss = preference_loss(pairs, torch.stack([first, 1 - first], dim=1), torch.ones(len(first)))
        update(loss.value)
        yield {"loss": loss.value.item(), "accuracy": loss.metrics["accuracy"].item()}


def learn_labels(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool, recipe: Recipe, generator: Generator
) -> Iterator[dict[str, float]]:
    """Teach the CLIP the labels of a pool's pairs, in place; a step takes all pairs of a few prompts."""
    prompts = list(dict.fromkeys(pool.prompts))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    of_pair = torch.tensor([place[pool.prompts[i]] for i in pool.first.tolist()])
    of_picture = torch.tensor([place[prompt] for prompt in pool.prompts])
    for update in updates(list(clip.parameters()), recipe.label_steps, recipe.label_rate, **SCHEDULE):
        chosen = torch.randperm(len(prompts), generator=generator)[: recipe.preference_prompts]
        rows = torch.isin(of_picture, chosen).nonzero().flatten()  # (p,)
        pairs = torch.isin(of_pair, chosen).nonzero().flatten()  # (m,)
        shown = [prompts[i] for i in chosen.tolist()]
        prompt_of = (of_picture[rows, None] == chosen).int().argmax(dim=1)  # (p,)
        scores = score(clip, tokenizer, mirror(pool.pictures[rows], generator), shown, prompt_of)  # (p,)
        both = torch.stack([pool.first[pairs], pool.second[pairs]], dim=1)  # (m, 2)
        label = torch.stack([pool.label[pairs], 1 - pool.label[pairs]], dim=1)
        loss = preference_loss(scores[torch.searchsorted(rows, both)], label, torch.ones(len(pairs)))
        update(loss.value)
        yield {"loss": loss.value.item(), "accuracy": loss.metrics["accuracy"].item()}


def score(clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, prompts: list[str], prompt_of: Tensor) -> Tensor:
    """Scores (n,) of pictures (n, 3, 64, 64), each for the prompt at its place prompt_of (n,) in `prompts`."""
    text = F.normalize(clip.get_text_features(input_ids=token_ids(tokenizer, prompts)).pooler_output, dim=1)
    images = F.normalize(clip.get_image_features(pixel_values=normalise(pictures)).pooler_output, dim=1)
    return clip.logit_scale.exp() * (images * text[prompt_of]).sum(dim=1)


def score_groups(clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, prompts: list[str]) -> Tensor:
    """Scores (p, m) of pictures (p * m, 3, 64, 64) for p prompts."""
    prompt_of = torch.arange(len(prompts)).repeat_interleave(len(pictures) // len(prompts))
    return score(clip, tokenizer, pictures, prompts, prompt_of).unflatten(0, (len(prompts), -1))


def drawn_groups(vae: AutoencoderKL, scenes: Sequence[Scene], num: int, share: float) -> Callable[[Generator], Group]:
    """Freshly drawn groups of `num` prompts, through the autoencoder; some differ from their prompt."""

    def draw(generator: Generator) -> Group:
        drawn = [scenes[i] for i in torch.randint(len(scenes), (num,), generator=generator).tolist()]
        repeated = [scene for scene in drawn for _ in range(GROUP)]
        attributes = draw_attributes(repeated, generator)
        strangers = [scenes[i] for i in torch.randint(len(scenes), (len(repeated),), generator=generator).tolist()]
        swap = torch.rand(attributes.shape, generator=generator) < torch.tensor(OTHER)
        shown = torch.where(swap, draw_attributes(strangers, generator), attributes)
        hidden = shown[:, 1] == shown[:, 3]  # object and background of one colour
        shown[hidden] = attributes[hidden]
        named = torch.tensor([[s.size is not None, True, True, s.background is not None] for s in repeated])
        right = ((shown == attributes) | ~named).float().mean(dim=1)
        quality = draw_care(len(repeated), generator)
        finish = -(quality[:, :3] / torch.tensor([0.6, 4.0, 0.18])).sum(dim=1)
        content = {"alignment": right, "layout": -quality[:, 3:].norm(dim=1)}
        utility = combine(finish, content, ALIGNED_AND_CENTRED, share=share)
        pictures = reconstruct(vae, render(shown, quality, generator), generator)
        return Group(pictures, [scene.prompt for scene in drawn], utility)

    return draw


def generated_groups(
    pictures: Tensor, members: Sequence[Tensor], prompts: Sequence[str], utility: Tensor, num: int
) -> Callable[[Generator], Group]:
    """Groups out of a pool of 8-bit pictures: `members` holds the indices, GROUP or more, of each of the prompts."""

    def draw(generator: Generator) -> Group:
        chosen = torch.randint(len(members), (num,), generator=generator).tolist()
        index = torch.cat([members[i][torch.randperm(len(members[i]), generator=generator)[:GROUP]] for i in chosen])
        return Group(pictures[index] / 255, [prompts[i] for i in chosen], utility[index])

    return draw
