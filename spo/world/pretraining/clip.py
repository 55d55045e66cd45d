"""The embedded default's CLIP: tokenizer and two small towers, first taught which prompt belongs to which picture.

The diffusion model's text encoder starts from its text tower, as Stable Diffusion's does from CLIP's. Taught
preferences as well, the CLIP plays PickScore's part: the step-aware preference model starts from it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from spo.world.pretraining.recipe import Recipe
from spo.world.pretraining.updates import updates
from spo.world.scenes import BACKGROUNDS, SHAPES, SIZES, all_scenes, draw_attributes, draw_quality, render

CONTEXT = 16  # tokens; the longest prompt of the world takes all of them
WORDS = ("a", "an", "on", "background", *SIZES, *BACKGROUNDS, *SHAPES)
END = "<|endoftext|>"


def new_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges that make most words of the world one token (green and black take four); others are letters."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        head, *rest = [*word[:-1], word[-1] + "</w>"]
        for part in rest:
            if (head, part) not in merges:
                merges.append((head, part))
            head += part
            if head not in vocabulary:
                vocabulary.append(head)
    vocabulary += ["<|startoftext|>", END]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CONTEXT)


def new_clip(tokenizer: CLIPTokenizer, *, width: int = 64, layers: int = 3) -> CLIPModel:
    """Untrained towers for pictures of 64 px; width and layers are the vision tower's."""
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftext|>", END])
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=2.3))


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids (n, CONTEXT), padded and truncated."""
    tokens = tokenizer(prompts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return tokens.input_ids


def normalise(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] -> CLIP's mean and deviation."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    return (pictures - mean) / std


def train_clip(
    clip: CLIPModel, tokenizer: CLIPTokenizer, recipe: Recipe, generator: Generator
) -> Iterator[dict[str, float]]:
    """Contrast freshly drawn pictures with prompts, in place."""
    scenes = all_scenes()
    ids = token_ids(tokenizer, [scene.prompt for scene in scenes])
    for update in updates(list(clip.parameters()), recipe.clip_steps, recipe.clip_rate, warm_up=50, floor=0.05):
        chosen = torch.randint(len(scenes), (recipe.clip_batch,), generator=generator)
        attributes = draw_attributes([scenes[i] for i in chosen.tolist()], generator)
        pictures = render(attributes, draw_quality(recipe.clip_batch, generator), generator)
        images = clip.get_image_features(pixel_values=normalise(pictures)).pooler_output
        texts = clip.get_text_features(input_ids=ids[chosen]).pooler_output
        loss, right = contrast(images, texts, chosen, clip.logit_scale.exp())
        update(loss)
        yield {"loss": loss.item(), "right": right.item()}


def contrast(images: Tensor, texts: Tensor, chosen: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss of images and texts (n, d), and the share of pictures that find their text.

    chosen: (n,) the text's index; the same text twice in a batch counts as right both times.
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    target = (chosen[:, None] == chosen[None]).float()
    target /= target.sum(dim=1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    right = target.gather(1, logits.argmax(dim=1, keepdim=True)) > 0
    return loss, right.float().mean()


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """The text tower as the diffusion model's text encoder."""
    encoder = CLIPTextModel(CLIPTextConfig(**clip.config.text_config.to_dict()))
    own = encoder.state_dict()
    tower = clip.text_model.state_dict()
    encoder.load_state_dict({k if k in own else f"text_model.{k}": weight.clone() for k, weight in tower.items()})
    return encoder


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
