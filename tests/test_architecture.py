"""The import contracts of pyproject.toml, and what they cannot express."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import grimp
import yaml

from spo.pipeline import PIPELINE, STAGES

ROOT = Path(__file__).parents[1]
# What serves every stage: a change of it changes no result.
SERVICES = {"config", "errors", "pipeline", "runtime", "tracking", "workspace"}


def test_import_contracts_are_kept() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_commands_loads_no_heavy_library() -> None:
    program = "import spo.__main__, sys; print(sorted({'torch', 'mlflow', 'prefect', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_stage_of_the_pipeline_is_a_command_with_a_module() -> None:
    assert set(pipeline()) == set(STAGES)
    assert [stage for stage, entry in pipeline().items() if not entry.get("frozen")] == list(PIPELINE)
    for stage, entry in pipeline().items():
        assert entry["cmd"].startswith(f"python -m spo {stage}")
        assert (ROOT / "spo" / "stages" / f"{stage}.py").is_file()


def test_a_stage_depends_on_code_and_data_that_are_there() -> None:
    for stage, entry in pipeline().items():
        for path in entry.get("deps", []):
            assert path.startswith("runs/") or (ROOT / path).exists(), f"{stage} depends on {path}, which is not there"


def test_a_stage_depends_on_all_the_code_that_it_imports() -> None:
    graph = grimp.build_graph("spo", cache_dir=None)
    for stage, entry in pipeline().items():
        if entry.get("frozen"):
            continue
        covered = [ROOT / path for path in entry["deps"]]
        for module in graph.find_upstream_modules(f"spo.stages.{stage}"):
            if not SERVICES.isdisjoint(module.split(".")[1:2]):
                continue
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            if path.is_file():  # packages' __init__ hold no code
                assert any(path.is_relative_to(dep) for dep in covered), f"{stage} imports {module}: add it to dvc.yaml"


def test_a_stages_tracked_settings_are_the_pipelines_params() -> None:
    for stage in [stage for stage in PIPELINE if STAGES[stage].sections]:
        params = [param for param in pipeline()[stage]["params"] if "configs/${profile}.yaml" in param]
        names = {name.partition(".")[0] for param in params for name in param["configs/${profile}.yaml"]}
        own = {"align": ("align", "preference_models"), "train_preference": ("preference_models",)}
        tracked = {*STAGES[stage].sections, *own.get(stage, ())}
        assert names == tracked, stage
        for profile in (ROOT / "configs").glob("*.yaml"):  # DVC reads the file, not the defaults
            written = yaml.safe_load(profile.read_text(encoding="utf-8"))
            assert names <= set(written), f"{profile} must spell out what {stage} reads"


def pipeline() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
