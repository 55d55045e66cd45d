import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.settings import parse, settings_of_run, use_profile
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
    overrides = {"configs/tiny.yaml:align.spo.beta": 5.0, "params.yaml:training_seeds": [3]}
    with settings_of_run(None, overrides, root, keep=True) as told:
        pass
    assert told[1].startswith("configs/tiny.yaml: align.spo.beta is 5.0, was ")
    config = load_config(root)
    assert config.align["spo"].beta == 5.0  # type: ignore[union-attr]
    assert config.training_seeds == (3,)
    after = texts(root)
    assert after["sd15.yaml"] == before["sd15.yaml"]
    comments = [line.partition("#")[2] for line in before["tiny.yaml"].splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in after["tiny.yaml"].splitlines() if "#" in line] == comments


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"align.spo.beta": -1}, r"^configs/tiny.yaml: align.spo.beta: .* got -1"),
        ({"align.spo.bet": 1}, "align.spo.bet: unknown key"),
        ({"seed.of.all": 1}, "seed.of is no section|seed is no section"),
        ({"dvc.yaml:stages": {}}, r"overrides name dvc.yaml; use one of \['params.yaml', 'configs/flux.yaml'"),
        ({"align.spo.beta": 5.0, "evaluate.primary": "nothing"}, "primary and guarded must be scores"),
    ],
)
def test_what_would_not_be_valid_is_refused_and_nothing_is_written(root: Path, overrides: dict, message: str) -> None:
    before = texts(root)
    with pytest.raises(ConfigError, match=message):
        with settings_of_run(None, overrides, root):
            pass
    assert texts(root) == before


def test_values_of_the_command_line_are_yaml() -> None:
    assert parse(["align.spo.beta=1e-3", "params.yaml:methods=[spo, d3po]"]) == {
        "align.spo.beta": 1e-3,
        "params.yaml:methods": ["spo", "d3po"],
    }
    with pytest.raises(ConfigError, match="write KEY=VALUE"):
        parse(["align.spo.beta"])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    for name in ("tiny", "sd15"):
        (tmp_path / "configs" / f"{name}.yaml").write_text("seed: 0\n")
    (tmp_path / "params.yaml").write_text("# which one\nprofile: tiny\nmethods: [spo]  # of align\n")
    return tmp_path


def test_no_profile_means_the_one_that_params_name(small: Path) -> None:
    before = (small / "params.yaml").read_text()
    assert use_profile(None, small) == "tiny"
    assert (small / "params.yaml").read_text() == before


def test_a_profile_is_written_and_all_else_stays(small: Path) -> None:
    assert use_profile("sd15", small) == "sd15"
    assert (small / "params.yaml").read_text() == "# which one\nprofile: sd15\nmethods: [spo]  # of align\n"


def test_a_missing_profile_line_is_added(small: Path) -> None:
    (small / "params.yaml").write_text("methods: [spo]\n")
    use_profile("sd15", small)
    assert (small / "params.yaml").read_text() == "profile: sd15\nmethods: [spo]\n"


@pytest.mark.parametrize("profile", ["sdxxl", "../configs/tiny"])
def test_an_unknown_profile_is_refused_with_the_known_ones(small: Path, profile: str) -> None:
    before = (small / "params.yaml").read_text()
    with pytest.raises(ConfigError, match=r"use one of \['sd15', 'tiny'\]"):
        use_profile(profile, small)
    assert (small / "params.yaml").read_text() == before


def test_outside_of_a_project_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run from the project's folder"):
        use_profile("tiny", tmp_path)


def test_a_runs_profile_and_overrides_belong_to_that_run(root: Path) -> None:
    before = texts(root)
    with settings_of_run("sd15", {"evaluate.num_prompts": 7}, root) as changes:
        assert load_config(root).profile == "sd15"
        assert load_config(root).evaluate.num_prompts == 7
        assert changes[0] == "profile sd15"
        assert load_config(root, "tiny").evaluate.num_prompts != 7
    assert texts(root) == before
    with settings_of_run(None, {}, root):
        assert load_config(root).profile == "tiny"


def test_what_a_killed_run_left_is_put_back_and_what_the_user_changed_stays(root: Path) -> None:
    before = texts(root)
    program = (
        "import os, sys; from pathlib import Path; from flows.settings import settings_of_run\n"
        "with settings_of_run('sd15', {'evaluate.num_prompts': 7, 'configs/tiny.yaml:seed': 5}, Path(sys.argv[1])):\n"
        "    os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(root)], cwd=ROOT, check=False).returncode == 9
    assert load_config(root).evaluate.num_prompts == 7
    (root / "configs/tiny.yaml").write_text("mine: 1\n")
    with settings_of_run("sdxl", {}, root):
        assert texts(root)["sd15.yaml"] == before["sd15.yaml"]
    after = texts(root)
    assert after == before | {"tiny.yaml": "mine: 1\n"}


def test_settings_stay_where_the_run_was_asked_to_keep_them(root: Path) -> None:
    with settings_of_run("sd15", {"evaluate.num_prompts": 7}, root, keep=True):
        pass
    with settings_of_run(None, {}, root):
        assert load_config(root).profile == "sd15"
        assert load_config(root).evaluate.num_prompts == 7


def test_a_second_run_in_the_folder_waits_for_the_first(root: Path) -> None:
    seen = []

    def second() -> None:
        with settings_of_run(None, {}, root):
            seen.append(load_config(root).profile)

    thread = threading.Thread(target=second)
    with settings_of_run("sd15", {}, root):
        thread.start()
        assert load_config(root).profile == "sd15"
    thread.join()
    assert seen == ["tiny"]


@pytest.mark.parametrize("text", ["profile: [", "- profile", "profile: tiny\nmethods: [nothing]\n"])
def test_broken_settings_are_one_line_that_names_the_file(root: Path, text: str) -> None:
    (root / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^(params|configs/tiny)\.yaml") as caught:
        with settings_of_run(None, {}, root):
            pass
    assert "\n" not in str(caught.value)
