"""Make the models and data of the profiles `tiny*` again: base models, preference models, prompts, pairs.

The results are in git and the stage is frozen in dvc.yaml; `python -m spo pretrain` runs it. It takes about six hours
on two CPU cores, half of them for the flow model (estimated from the time of a step). Finished parts are cached in
.cache/pretrain, so a killed run continues with the next part. The recipe is fixed; the last digits of the weights
depend on the machine.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from spo.config import Config, ModelConfig
from spo.runtime.files import atomic_path, read_json, write_json, write_text
from spo.tracking import Tracker
from spo.world.pretraining import cards, parts
from spo.world.pretraining.pairs import write_comparisons, write_pairs
from spo.world.pretraining.recipe import RECIPE
from spo.world.scenes import all_scenes


def run(config: Config, *, root: Path = Path(), tracker: Tracker) -> None:
    """Write the folders data/base/tiny* and data/preferences/tiny*, and data/prompts/world.txt."""
    torch.set_flush_denormal(True)
    data, work = root / "data", root / ".cache" / "pretrain"
    prompts = [scene.prompt for scene in all_scenes()]
    write_text(data / "prompts" / "world.txt", "\n".join(prompts) + "\n")

    vae = _once(work / "vae", parts.make_vae)
    clip = _once(work / "clip", parts.make_clip)
    base = _once(work / "denoiser", lambda folder: parts.make_denoiser(folder, vae, clip))
    pool = parts.load_pool(_once(work / "pool", lambda folder: parts.make_pool(folder, base, prompts)))
    taught = parts.training_prompts(config)
    lessons = _once(work / "lessons", lambda folder: parts.make_lessons(folder, base, taught))
    preference = _once(work / "preference", lambda folder: parts.make_preference(folder, vae, lessons, pool, config))
    people = parts.load_pool(_once(work / "people-pool", lambda folder: parts.make_people_pool(folder, base, prompts)))
    sight = preference / parts.SIGHT
    of_people = _once(
        work / "people-preference", lambda folder: parts.make_people_preference(folder, sight, people, config)
    )
    flow = _once(work / "flow", lambda folder: parts.make_flow(folder, base, preference))

    base_config = ModelConfig(family="sd15", path=str(base), resolution=64)
    flow_config = ModelConfig(family="sd3", path=str(flow), resolution=64, t5=False, t5_tokens=1)
    figures = {
        "base": parts.score_base(base_config, prompts),
        "flow": parts.score_base(flow_config, prompts),
        "preference": read_json(preference / "accuracy.json"),
        "people": read_json(of_people / "accuracy.json"),
    }
    with atomic_path(data / "base" / "tiny") as folder:
        shutil.copytree(base, folder)
        write_text(folder / "README.md", cards.base(RECIPE, figures["base"]))
    with atomic_path(data / "base" / "tiny-flow") as folder:
        shutil.copytree(flow, folder)
        write_text(folder / "README.md", cards.flow(RECIPE, figures["flow"]))
    with atomic_path(data / "base" / "tiny-preference") as folder:
        shutil.copytree(preference, folder, ignore=shutil.ignore_patterns("accuracy.json", parts.SIGHT))
        write_text(folder / "README.md", cards.preference(RECIPE, figures["preference"]))
    with atomic_path(data / "preferences" / "tiny") as folder:
        folder.mkdir()
        write_pairs(pool, folder / "pairs.parquet", parts.generator(5))
        write_text(folder / "README.md", cards.pairs(RECIPE, pool))
    with atomic_path(data / "base" / "tiny-people-preference") as folder:
        shutil.copytree(of_people, folder, ignore=shutil.ignore_patterns("accuracy.json"))
        write_text(folder / "README.md", cards.people_preference(RECIPE, figures["people"]))
    with atomic_path(data / "preferences" / "tiny-people") as folder:
        folder.mkdir()
        write_comparisons(people, folder / "pairs.parquet")
        write_text(folder / "README.md", cards.people(RECIPE, people))
    write_json(work / "metrics.json", figures)
    tracker.log_metrics(figures)


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a part if it is not finished."""
    if not folder.exists():
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            make(temporary)
    return folder
