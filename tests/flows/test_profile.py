from pathlib import Path

import pytest

from flows.settings import use_profile
from spo.errors import ConfigError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    for name in ("tiny", "sd15"):
        (tmp_path / "configs" / f"{name}.yaml").write_text("seed: 0\n")
    (tmp_path / "params.yaml").write_text("# which one\nprofile: tiny\nmethods: [spo]  # of align\n")
    return tmp_path


def test_no_profile_means_the_one_that_params_name(root: Path) -> None:
    before = (root / "params.yaml").read_text()
    assert use_profile(None, root) == "tiny"
    assert (root / "params.yaml").read_text() == before


def test_a_profile_is_written_and_all_else_stays(root: Path) -> None:
    assert use_profile("sd15", root) == "sd15"
    assert (root / "params.yaml").read_text() == "# which one\nprofile: sd15\nmethods: [spo]  # of align\n"


def test_a_missing_profile_line_is_added(root: Path) -> None:
    (root / "params.yaml").write_text("methods: [spo]\n")
    use_profile("sd15", root)
    assert (root / "params.yaml").read_text() == "profile: sd15\nmethods: [spo]\n"


@pytest.mark.parametrize("profile", ["sdxxl", "../configs/tiny"])
def test_an_unknown_profile_is_refused_with_the_known_ones(root: Path, profile: str) -> None:
    before = (root / "params.yaml").read_text()
    with pytest.raises(ConfigError, match=r"use one of \['sd15', 'tiny'\]"):
        use_profile(profile, root)
    assert (root / "params.yaml").read_text() == before


def test_outside_of_a_project_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run from the project's folder"):
        use_profile("tiny", tmp_path)
