"""What PickScore is to Stable Diffusion: the embedded default's CLIP, taught preferences on clean pictures."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from spo.core.losses import preference_loss
from spo.pretrain.clip import normalise, token_ids
from spo.pretrain.pairs import Pool


def train_preference(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pool: Pool,
    rows: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: Generator,
) -> Iterator[dict[str, float]]:
    """Teach the CLIP the labels of the pairs `rows` (indices of the pool's pairs), in place."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (0.95 * (1 - step / steps) + 0.05)
        chosen = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        label = torch.stack([pool.label[chosen], 1 - pool.label[chosen]], dim=1)
        loss = preference_loss(scores(clip, tokenizer, pool, chosen), label, torch.ones(batch_size))
        optimizer.zero_grad()
        loss.value.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        yield {"loss": loss.value.item(), "accuracy": loss.metrics["accuracy"].item()}


def scores(clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool, chosen: Tensor) -> Tensor:
    """Scores (m, 2) of the pairs at `chosen` (m,)."""
    prompts = [pool.prompts[i] for i in pool.first[chosen].tolist()]
    text = F.normalize(clip.get_text_features(input_ids=token_ids(tokenizer, prompts)).pooler_output, dim=1)
    pictures = torch.stack([pool.pictures[pool.first[chosen]], pool.pictures[pool.second[chosen]]], dim=1)
    images = clip.get_image_features(pixel_values=normalise(pictures.flatten(0, 1))).pooler_output
    images = F.normalize(images, dim=1).unflatten(0, (-1, 2))
    return clip.logit_scale.exp() * (images * text[:, None]).sum(dim=-1)
