"""The memory of the full-size profiles by stage, and the settings with which each stage fits a GPU.

python -m bench.memory_table                    # print the table; nothing is loaded and no GPU is needed
python -m bench.memory_table --write-docs       # write it into docs/performance.md
"""

import sys
from pathlib import Path

from bench.markdown import table
from spo.commands.memory_estimate import estimate
from spo.commands.memory_remedy import remedy
from spo.config import load_config

PROFILES = ("sd15", "sdxl", "sd35", "flux")
JOBS = ("train_preference pixel", "train_preference latent", "align spo", "align lpo")
GPUS = (24, 40, 80)  # GiB
DOCS = Path("docs/performance.md")
BEGIN, END = "<!-- bench.memory_table: begin -->", "<!-- bench.memory_table: end -->"


def memory_table() -> str:
    """A row for each job of each profile: GB as shipped, and for each GPU whether that fits, or what does."""
    rows = [["", "counted, GB", "activations, GB", "in all, GB", *(f"{gib} GB" for gib in GPUS)]]
    for name in PROFILES:
        config = load_config(profile=name)
        for job in JOBS:
            found = estimate(config, job)
            figures = [f"{value / 1e9:.1f}" for value in (found.counted, found.activations, found.total)]
            fits = [
                "as shipped" if found.fits(gib * 2**30) else _short(remedy(config, job, gib * 2**30), job)
                for gib in GPUS
            ]
            rows.append([f"{name}: {job}", *figures, *fits])
    return table(rows)


def _short(settings: str | None, job: str) -> str:
    """The settings without the name of the job's own section."""
    stage, _, name = job.partition(" ")
    section = f"preference_models.{name}." if stage == "train_preference" else f"{stage}.{name}."
    return "no" if settings is None else settings.replace(section, "")


def write_docs(docs: Path) -> None:
    """Write the table between the marks in `docs`."""
    before, _, rest = docs.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    docs.write_text(f"{before}{BEGIN}\n{memory_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-docs"]:
        write_docs(DOCS)
    else:
        print(memory_table())
