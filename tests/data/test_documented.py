"""docs/data.md lists every format and column that is read."""

from itertools import chain
from pathlib import Path

import pytest

from spo.data import pair_layouts, preference_files, prompt_files
from spo.data.images import PLAIN

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
LAYOUTS = (pair_layouts.LABELLED, *pair_layouts.DECIDED, *pair_layouts.RANKED)
COLUMNS = {name for layout in LAYOUTS for name in chain.from_iterable(layout.values())}


@pytest.mark.parametrize(
    "name", sorted({*COLUMNS, *prompt_files.FIELDS, *prompt_files.SUFFIXES, *preference_files.SUFFIXES})
)
def test_every_column_and_suffix_is_in_the_table(name: str) -> None:
    assert f"`{name}`" in "".join(line for line in TEXT.splitlines() if line.startswith("|"))


def test_every_format_of_pictures_is_in_the_table() -> None:
    assert all(name.lower() in TEXT.lower() for name in (*PLAIN, "AVIF"))
