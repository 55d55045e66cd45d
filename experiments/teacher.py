"""The clean-image preference model of a cell: a model that sees but has no preference learns the cell's opinion.

`python -m spo pretrain` makes the embedded default's in the same way, from the same kinds of pictures: those of the
prepared pairs, more by the base for the training prompts, and drawn ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Generator
from transformers import CLIPModel, CLIPTokenizer

from experiments.pictures import Pictures
from spo.runtime.files import atomic_path
from spo.world.opinion import Opinion
from spo.world.pretraining import parts
from spo.world.pretraining.clip import save_clip
from spo.world.pretraining.preference import GROUP, Group, drawn_groups, generated_groups
from spo.world.pretraining.recipe import RECIPE
from spo.world.scenes import Scene


@dataclass(frozen=True)
class Effort:
    """The amount of training of a preference model."""

    sight_pictures: int = RECIPE.sight_pictures
    sight_steps: int = RECIPE.sight_steps
    lessons_per_prompt: int = RECIPE.lessons_per_prompt
    preference_steps: int = RECIPE.preference_steps


class Teacher:
    """Trains preference models; the one without preference is trained once, in `folder`."""

    def __init__(self, vae: Path, prompts: Sequence[str], pools: Sequence[Pictures], folder: Path, effort: Effort):
        self.vae = AutoencoderKL.from_pretrained(vae).eval().requires_grad_(False)
        self.prompts = list(prompts)
        self.pools = pools
        self.folder = folder
        self.effort = effort

    def teach(self, opinion: Opinion, target: Path, *, seed: int) -> None:
        """Write the CLIP that has learned `opinion` to `target`."""
        effort = self.effort
        if not self.folder.exists():
            torch.manual_seed(0)  # of the fresh weights
            random = Generator().manual_seed(0)
            recipe = replace(RECIPE, sight_pictures=effort.sight_pictures, sight_steps=effort.sight_steps)
            _save(*parts.train_to_see(self.vae, self.prompts, recipe, random), self.folder)
        clip, tokenizer = CLIPModel.from_pretrained(self.folder).train(), CLIPTokenizer.from_pretrained(self.folder)
        random = Generator().manual_seed(seed)
        recipe = replace(RECIPE, preference_steps=effort.preference_steps)
        parts.train_to_prefer(clip, tokenizer, self._sources(opinion.share), opinion, recipe, random)
        _save(clip, tokenizer, target)

    def _sources(self, share: float) -> list[Callable[[Generator], Group]]:
        num = RECIPE.preference_prompts
        sources = [drawn_groups(self.vae, [Scene.parse(prompt) for prompt in self.prompts], num, share)]
        for pool in self.pools:
            members: dict[str, list[int]] = {prompt: [] for prompt in self.prompts}
            for i, prompt in enumerate(pool.prompts):
                if prompt in members:
                    members[prompt].append(i)
            enough = {prompt: torch.tensor(rows) for prompt, rows in members.items() if len(rows) >= GROUP}
            if enough:
                utility = pool.utility(share)
                sources.append(generated_groups(pool.pixels, list(enough.values()), list(enough), utility, num))
        return sources


def _save(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    with atomic_path(folder) as temporary:
        save_clip(clip.eval(), tokenizer, temporary)
