"""A fresh clone of this project, small enough to run whole, and the commands that a person types in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[2]
QUICK = {  # the shipped profile with as little work as every stage takes
    "sampling": {"steps": 4},
    "evaluate": {
        "num_prompts": 4,
        "num_validation_prompts": 2,
        "samplers": {"ddim": {"steps": 2, "eta": 0.0}, "ddim-stochastic": {"steps": 2, "eta": 1.0}},
        "bootstrap_samples": 50,
    },
}
QUICK_PREFERENCE = {
    "steps": 2,
    "batch_size": 4,
    "warmup_steps": 1,
    "evaluate_timesteps": [1],
    "evaluate_pairs": 4,
    "candidates": {"metric": {"kind": "oracle"}, "score": "aesthetic", "num_prompts": 2},
}
QUICK_SPO = {
    "epochs": 1,
    "watch": None,
    "prompts_per_rollout": 16,
    "candidates": 2,
    "first_step": 1,
    "threshold": 0.0,
    "checkpoints": 1,
}


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a shell in `folder` has: this Python first, a home of its own, no settings of whoever runs the tests."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DVC_", "GIT_", "PREFECT_"))
    }
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "true",
        "GIT_AUTHOR_NAME": "Test",
        "GIT_AUTHOR_EMAIL": "test@example.org",
        "GIT_COMMITTER_NAME": "Test",
        "GIT_COMMITTER_EMAIL": "test@example.org",
        **more,
    }


def shell(line: str, folder: Path, environment_: Mapping[str, str] | None = None) -> str:
    """One line as typed, in `folder`; what it printed. The test fails where the line does."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env=dict(environment_ or environment(folder)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, f"{line}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """This checkout's files as git has or would have them, committed in a repository of their own."""
    files = shell("git ls-files -z --cached --others --exclude-standard", ROOT, os.environ).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    shell("git init -q -b main && git add -A && git commit -qm start", target)
    return target


def make_quick(project: Path) -> None:
    """Make the default profile of `project` as short as it can be: few prompts, pairs and steps; not committed."""
    prompts = project / "data" / "prompts" / "world.txt"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[::24]))
    pairs = project / "data" / "preferences" / "tiny" / "pairs.parquet"
    pq.write_table(pq.read_table(pairs).slice(0, 200), pairs)
    params = "profile: tiny\nmethods: [spo]\ntrain_preference: [pixel]\ntraining_seeds: [0]\n"
    (project / "params.yaml").write_text(params)
    path = project / "configs" / "tiny.yaml"
    config = yaml.safe_load(path.read_text())
    for section, settings in QUICK.items():
        config[section] |= settings
    config["preference_models"] = {"pixel": config["preference_models"]["pixel"] | QUICK_PREFERENCE}
    config["align"] = {"spo": config["align"]["spo"] | QUICK_SPO}
    path.write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, without a DVC cache or remote, in which `dvc repro` has run once; not to be changed."""
    project = copy_checkout(tmp_path_factory.mktemp("ran") / "project")
    make_quick(project)
    shell("dvc repro && git add -A && git commit -qm ran", project)
    return project
