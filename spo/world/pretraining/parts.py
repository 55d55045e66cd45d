"""The parts of the embedded default, in the order in which they are made; each writes one folder."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from transformers import CLIPModel, CLIPTokenizer

from spo.config import Config, ModelConfig, SamplerConfig
from spo.data.prompts import split_of
from spo.preference.labels import pairwise_accuracy
from spo.runtime.files import read_json, write_json
from spo.runtime.progress import Progress
from spo.world.opinion import Opinion
from spo.world.oracle import oracle_scores
from spo.world.pretraining.clip import new_clip, new_tokenizer, save_clip, text_encoder_of, train_clip
from spo.world.pretraining.denoiser import draw_latents, new_unet, save_pipeline, train_denoiser
from spo.world.pretraining.flow import Frozen, encode, new_transformer, save_flow, train_flow
from spo.world.pretraining.pairs import Pool, compare, compare_all, paint, recognisable, sample_pool
from spo.world.pretraining.preference import (
    Group,
    draw_stock,
    drawn_groups,
    generated_groups,
    learn_labels,
    score_groups,
    train_preference,
    train_sight,
)
from spo.world.pretraining.recipe import RECIPE, Recipe
from spo.world.pretraining.vae import finish_vae, new_vae, train_vae
from spo.world.scenes import Scene, all_scenes

SIGHT = "sight"  # folder of the CLIP that sees and prefers nothing, within the preference model's
GUIDANCE = 3.0  # of the pictures by which a base is scored
PREFERENCE_SCALE = 10.0  # of the cosine, where the preferences start


def generator(part: int) -> Generator:
    """Each part's own random numbers; the global ones, which fresh weights take, are set as well."""
    torch.manual_seed(100 * RECIPE.seed + part)
    return Generator().manual_seed(100 * RECIPE.seed + part)


def make_vae(folder: Path) -> None:
    """The autoencoder."""
    random = generator(0)
    vae = new_vae(channels=RECIPE.vae_channels, latent_channels=RECIPE.latent_channels)
    _run(train_vae(vae, RECIPE, random), RECIPE.vae_steps, "autoencoder")
    finish_vae(vae, random)
    vae.save_pretrained(folder)


def make_clip(folder: Path) -> None:
    """The CLIP that knows which prompt belongs to which picture."""
    random = generator(1)
    tokenizer = new_tokenizer()
    clip = new_clip(tokenizer)
    _run(train_clip(clip, tokenizer, RECIPE, random), RECIPE.clip_steps, "CLIP")
    save_clip(clip.eval(), tokenizer, folder)


def make_denoiser(folder: Path, vae_folder: Path, clip_folder: Path) -> None:
    """The base's pipeline."""
    random = generator(2)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text_encoder = text_encoder_of(CLIPModel.from_pretrained(clip_folder)).train()
    unet = new_unet(RECIPE.latent_channels).train()
    latents, scene_index = draw_latents(vae, RECIPE.latents, random)
    for steps, rate in RECIPE.unet_cycles:
        training = train_denoiser(
            unet,
            text_encoder,
            tokenizer,
            latents,
            scene_index,
            steps=steps,
            batch_size=RECIPE.unet_batch,
            learning_rate=rate,
            generator=random,
        )
        _run(training, steps, "UNet")
    save_pipeline(vae, unet.eval(), text_encoder.eval(), tokenizer, folder)


def make_pool(folder: Path, base: Path, prompts: Sequence[str]) -> None:
    """The pictures of the preference pairs, by the base, and the opinion of them."""
    random, num = generator(3), RECIPE.pictures_per_prompt
    rows, pictures = sample_pool(base, prompts, per_prompt=num, chunk=RECIPE.chunk, generator=random)
    _save_pool(compare(pictures, rows, prompts, RECIPE.opinion, random), folder)


def make_people_pool(folder: Path, base: Path, prompts: Sequence[str]) -> None:
    """Recognisable pictures by the base itself, and labels like people's of all pairs of a prompt's."""
    num, chunk = RECIPE.people_pictures, RECIPE.chunk
    rows, pictures = sample_pool(base, prompts, per_prompt=num, chunk=chunk, generator=generator(11))
    kept = recognisable(oracle_scores(pictures, [prompts[i] for i in rows.tolist()]))
    _save_pool(compare_all(pictures[kept], rows[kept], prompts, RECIPE.people, generator(9)), folder)


def _save_pool(pool: Pool, folder: Path) -> None:
    tensors = {name: value for name, value in asdict(pool).items() if isinstance(value, Tensor)}
    tensors["pictures"] = (pool.pictures * 255).round().byte()
    save_file(tensors, folder / "pool.safetensors")
    write_json(folder / "prompts.json", pool.prompts)


def load_pool(folder: Path) -> Pool:
    """The pool that `make_pool` or `make_people_pool` wrote."""
    tensors = load_file(folder / "pool.safetensors")
    return Pool(**{**tensors, "pictures": tensors["pictures"] / 255}, prompts=read_json(folder / "prompts.json"))


def training_prompts(config: Config) -> Sequence[str]:
    """The prompts that `prepare` will train on; the preference model sees no others."""
    return split_of([scene.prompt for scene in all_scenes()], config).train


def make_lessons(folder: Path, base: Path, prompts: Sequence[str]) -> None:
    """More pictures of the training prompts, by the base, to teach the preference model."""
    num = RECIPE.lessons_per_prompt
    rows, pictures = sample_pool(base, prompts, per_prompt=num, chunk=RECIPE.chunk, generator=generator(7))
    save_file({"pictures": (pictures * 255).round().byte(), "prompt": rows}, folder / "lessons.safetensors")


def make_preference(folder: Path, vae_folder: Path, lessons: Path, pool: Pool, config: Config) -> None:
    """The preference model that the step-aware one starts from; it never sees the prompts that `prepare` holds out."""
    random = generator(4)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
    prompts = training_prompts(config)
    clip, tokenizer = train_to_see(vae, prompts, RECIPE, random)
    save_clip(clip, tokenizer, folder / SIGHT)
    taught = load_file(lessons / "lessons.safetensors")
    own = torch.tensor([prompt in prompts for prompt in pool.prompts]).nonzero().flatten()
    shown = [pool.prompts[i] for i in own.tolist()]
    sources = [
        _groups(taught["pictures"], [prompts[i] for i in taught["prompt"].tolist()], prompts),
        _groups((pool.pictures[own] * 255).round().byte(), shown, prompts),
        drawn_groups(vae, [Scene.parse(prompt) for prompt in prompts], RECIPE.preference_prompts, RECIPE.share),
    ]
    train_to_prefer(clip, tokenizer, sources, RECIPE.opinion, RECIPE, random)
    save_clip(clip.eval(), tokenizer, folder)
    write_json(folder / "accuracy.json", _held_out_accuracy(clip, tokenizer, pool, set(prompts)))


def make_people_preference(folder: Path, sight: Path, pool: Pool, config: Config) -> None:
    """A CLIP that can see learns the labels of the pool's training prompts, and nothing else."""
    prompts = training_prompts(config)
    clip, tokenizer = CLIPModel.from_pretrained(sight).train(), CLIPTokenizer.from_pretrained(sight)
    torch.nn.init.constant_(clip.logit_scale, math.log(PREFERENCE_SCALE))
    taught = pool.of(set(prompts))
    _run(learn_labels(clip, tokenizer, taught, RECIPE, generator(10)), RECIPE.label_steps, "labels")
    save_clip(clip.eval(), tokenizer, folder)
    write_json(folder / "accuracy.json", _held_out_accuracy(clip, tokenizer, pool, set(prompts)))


def train_to_see(
    vae: AutoencoderKL, prompts: Sequence[str], recipe: Recipe, random: Generator
) -> tuple[CLIPModel, CLIPTokenizer]:
    """A new CLIP that recognises prompts and finish, and prefers nothing."""
    tokenizer = new_tokenizer()
    width, layers = recipe.tower
    clip = new_clip(tokenizer, width=width, layers=layers)
    scenes = [Scene.parse(prompt) for prompt in prompts]
    stock = draw_stock(vae, scenes, recipe.sight_pictures, random)
    _run(train_sight(clip, tokenizer, stock, scenes, recipe, random), recipe.sight_steps, "sight")
    return clip, tokenizer


def train_to_prefer(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    sources: Sequence[Callable[[Generator], Group]],
    opinion: Opinion,
    recipe: Recipe,
    random: Generator,
) -> None:
    """Teach an opinion to a CLIP that can see, in place."""
    torch.nn.init.constant_(clip.logit_scale, math.log(PREFERENCE_SCALE))
    steps = train_preference(clip, tokenizer, sources, opinion, recipe, random)
    _run(steps, recipe.preference_steps, "preference")


def _groups(pictures: Tensor, names: list[str], prompts: Sequence[str]) -> Callable[[Generator], Group]:
    """Groups of generated 8-bit pictures, each of a prompt in `names`, with the opinion of them."""
    members: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    for i, name in enumerate(names):
        members[name].append(i)
    values = RECIPE.opinion.utility(pictures / 255, names)
    rows = [torch.tensor(members[prompt]) for prompt in prompts]
    return generated_groups(pictures, rows, prompts, values, RECIPE.preference_prompts)


@torch.no_grad()
def _held_out_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool, known: set[str]) -> dict[str, float]:
    """On the shipped pairs of prompts that are not `known`."""
    rows = torch.tensor([pool.prompts[i] not in known for i in pool.first.tolist()]).nonzero().flatten()
    scores = []
    for part in rows.split(128):
        both = torch.stack([pool.pictures[pool.first[part]], pool.pictures[pool.second[part]]], dim=1).flatten(0, 1)
        scores.append(score_groups(clip, tokenizer, both, [pool.prompts[i] for i in pool.first[part].tolist()]))
    label = pool.label[rows]
    accuracy, num_pairs = pairwise_accuracy(torch.cat(scores), torch.stack([label, 1 - label], dim=1))
    return {"accuracy": accuracy, "pairs": num_pairs}


def make_flow(folder: Path, base: Path, preference: Path) -> None:
    """The flow model's pipeline."""
    random = generator(8)
    frozen = Frozen.load(base, preference)
    transformer = new_transformer(RECIPE.latent_channels).train()
    latents, scene_index = draw_latents(frozen.vae, RECIPE.flow_latents, random)
    transformer.to("cuda" if torch.cuda.is_available() else "cpu")
    training = train_flow(
        transformer,
        encode(frozen.text_encoders, frozen.tokenizer),
        latents,
        scene_index,
        steps=RECIPE.flow_steps,
        batch_size=RECIPE.flow_batch,
        learning_rate=RECIPE.flow_rate,
        generator=random,
    )
    _run(training, RECIPE.flow_steps, "flow")
    save_flow(frozen, transformer.cpu().eval(), folder)


def score_base(model: ModelConfig, prompts: Sequence[str]) -> dict[str, float]:
    """The oracle's means over pictures of a base model: 20 steps of its family's sampler, without noise."""
    order = torch.randperm(len(prompts), generator=generator(6))[: RECIPE.scored].tolist()
    names = [prompts[i] for i in order]
    sampler = SamplerConfig(scheduler=model.scheduler, guidance_scale=GUIDANCE)
    pictures = paint(model, names, sampler, seed=1, number=0, batch_size=RECIPE.chunk, label="base")
    scores = oracle_scores(pictures, names)
    return {name: round(values.mean().item(), 4) for name, values in scores.items()}


def _run(steps: Iterable[dict[str, float]], total: int, label: str) -> None:
    """Run a training to its end, showing running means."""
    recent: deque[dict[str, float]] = deque(maxlen=50)
    with Progress[None](total=total, label=label) as bar:
        for measured in steps:
            recent.append(measured)
            bar.update(**{name: sum(row[name] for row in recent) / len(recent) for name in measured})
