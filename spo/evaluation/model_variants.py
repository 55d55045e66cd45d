"""The models to compare and the images to make: each model has the same prompts and the same seeds."""

import sys
from dataclasses import dataclass
from pathlib import Path

from spo.config import Config, LoraSource, NetworkSource
from spo.errors import DataError, ModelError
from spo.models.generate import image_seed
from spo.runtime import distributed
from spo.runtime.files import read_json
from spo.workspace import Prepared, Workspace

BASE, CONTROL = "base", "contrast"
OTHERS_PROMPTS = 16  # whose pictures are kept for samplers that do not decide


@dataclass(frozen=True)
class Task:
    """One image to make: a prompt of a split, and the image's own seed."""

    prompt_index: int
    image_index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        """The name of the image's file."""
        return f"{self.prompt_index:04d}-{self.image_index}.png"


@dataclass(frozen=True)
class ModelVariant:
    """A model to compare: the base, a checkpoint of a method and training seed, or a published model."""

    column: str
    training_seed: int | None = None
    checkpoint: Path | None = None  # a folder that `load_policy` takes
    published: LoraSource | NetworkSource | None = None

    @property
    def place(self) -> str:
        """The folder of its images, within the evaluation's images."""
        return self.column if self.training_seed is None else f"{self.column}/seed-{self.training_seed}"

    @property
    def description(self) -> str:
        seed = "" if self.training_seed is None else f" seed {self.training_seed}"
        return f"{self.column}{seed}{'' if self.checkpoint is None else f' {self.checkpoint.name}'}"

    def cost(self) -> dict[str, float]:
        """The compute of training up to this checkpoint; zero for the base."""
        cost = {"seconds": 0.0, "unet_forwards": 0}
        return cost if self.checkpoint is None else {key: read_json(self.checkpoint / "cost.json")[key] for key in cost}


def tasks(prepared: Prepared, side: str, num_prompts: int, images_per_prompt: int, seed: int) -> list[Task]:
    """The first `num_prompts` prepared prompts of a side, `images_per_prompt` seeds each; says if there are fewer."""
    prompts = prepared.prompts(side, num_prompts)
    if len(prompts) < num_prompts and distributed.is_main():
        found = f"{prepared.prompts_file(side)} holds {len(prompts)} prompts, not the {num_prompts} that are asked for"
        print(f"note: {found}; all of them are evaluated", file=sys.stderr, flush=True)
    if len(prompts) < 2:
        raise DataError(f"{prepared.prompts_file(side)} holds {len(prompts)} prompts; evaluation needs at least 2")
    return [
        Task(i, j, prompt, image_seed(seed, prompt, j))
        for i, prompt in enumerate(prompts)
        for j in range(images_per_prompt)
    ]


def checkpoints(config: Config, method: str, training_seed: int, root: Path) -> list[ModelVariant]:
    """The checkpoints of a method and training seed, in the order of training; ModelError if there are none."""
    workspace = Workspace(config, root)
    found = workspace.checkpoints(method, training_seed)
    if not found:
        folder = workspace.aligned(method, training_seed)
        raise ModelError(f"{folder} holds no checkpoints; run `python -m spo align {method} --seed {training_seed}`")
    return [ModelVariant(method, training_seed, path) for path in found]
