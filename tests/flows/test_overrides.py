import shutil
from pathlib import Path

import pytest

from flows.settings import override, parse
from spo.config import load_config
from spo.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def texts(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (root / "params.yaml", *sorted((root / "configs").iterdir()))}


def test_an_override_changes_its_setting_and_no_comment(root: Path) -> None:
    before = texts(root)
    told = override(None, {"configs/tiny.yaml:align.spo.beta": 5.0, "params.yaml:training_seeds": [3]}, root)
    assert told[0].startswith("configs/tiny.yaml: align.spo.beta is 5.0, was ")
    config = load_config(root)
    assert config.align["spo"].beta == 5.0  # type: ignore[union-attr]
    assert config.training_seeds == (3,)
    after = texts(root)
    assert after["sd15.yaml"] == before["sd15.yaml"]
    comments = [line.partition("#")[2] for line in before["tiny.yaml"].splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in after["tiny.yaml"].splitlines() if "#" in line] == comments


def test_without_a_file_a_key_is_of_the_profile_that_runs(root: Path) -> None:
    override("sd15", {"evaluate.num_prompts": 7}, root)
    assert load_config(root, "sd15").evaluate.num_prompts == 7
    assert load_config(root, "tiny").evaluate.num_prompts != 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"align.spo.beta": -1}, r"overrides: configs/tiny.yaml: align.spo.beta: .* got -1"),
        ({"align.spo.bet": 1}, "align.spo.bet: unknown key"),
        ({"seed.of.all": 1}, "seed.of is no section|seed is no section"),
        ({"dvc.yaml:stages": {}}, r"overrides name dvc.yaml; use one of \['params.yaml', 'configs/sd15.yaml'"),
        ({"align.spo.beta": 5.0, "evaluate.primary": "nothing"}, "primary and guarded name scores"),
    ],
)
def test_what_would_not_be_valid_is_refused_and_nothing_is_written(root: Path, overrides: dict, message: str) -> None:
    before = texts(root)
    with pytest.raises(ConfigError, match=message):
        override(None, overrides, root)
    assert texts(root) == before


def test_values_of_the_command_line_are_yaml() -> None:
    assert parse(["align.spo.beta=1e-3", "params.yaml:methods=[spo, d3po]"]) == {
        "align.spo.beta": 1e-3,
        "params.yaml:methods": ["spo", "d3po"],
    }
    with pytest.raises(ConfigError, match="write KEY=VALUE"):
        parse(["align.spo.beta"])
