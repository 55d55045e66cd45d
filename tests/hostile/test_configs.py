"""Whatever a profile holds, loading it gives a configuration or one line."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spo.config import Config, load_config
from spo.errors import ConfigError
from tests.hostile.trying import JSON, assert_one_line, tries

TINY = yaml.safe_load((Path(__file__).parents[2] / "configs" / "tiny.yaml").read_text())


def places(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key and list item."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for key, inner in items for path in [(*at, key), *places(inner, (*at, key))]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    (root / "configs").mkdir()
    (root / "params.yaml").write_text("profile: own\n")
    return root


def assert_loads_or_explains(root: Path) -> None:
    try:
        assert isinstance(load_config(root), Config)
    except ConfigError as error:
        assert_one_line(error, 20_000)


@tries(150)
@given(place=st.sampled_from(places(TINY)), value=JSON, what=st.sampled_from(["set", "drop", "add"]))
def test_a_profile_with_a_value_changed_dropped_or_added(
    root: Path, place: tuple[Any, ...], value: Any, what: str
) -> None:
    values = inner = copy.deepcopy(TINY)
    for key in place[:-1]:
        inner = inner[key]
    if what == "set":
        inner[place[-1]] = value
    elif what == "drop":
        del inner[place[-1]]
    elif isinstance(inner, dict):
        inner[str(value)] = value
    (root / "configs" / "own.yaml").write_text(yaml.safe_dump(values))
    assert_loads_or_explains(root)


@tries(100)
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | JSON.map(yaml.safe_dump).map(str.encode))
def test_a_profile_of_any_bytes(root: Path, data: bytes) -> None:
    (root / "configs" / "own.yaml").write_bytes(data)
    assert_loads_or_explains(root)


@tries(50)
@given(data=st.binary(max_size=40) | JSON.map(yaml.safe_dump).map(str.encode))
def test_params_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, root: Path, data: bytes) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "params.yaml").write_bytes(data)
    assert_loads_or_explains(other)


def test_yaml_that_would_make_objects_makes_none(root: Path, tmp_path: Path) -> None:
    (root / "configs" / "own.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(root)
    assert not (tmp_path / "made").exists()
