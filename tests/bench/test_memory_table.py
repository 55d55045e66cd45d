from pathlib import Path

import pytest

from bench import memory_table
from bench.memory_table import BEGIN, END

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_documented_table_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the profiles as they are: after a change, run `python -m bench.memory_table --write-docs`."""
    monkeypatch.chdir(ROOT)
    text = memory_table.DOCS.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == memory_table.memory_table()


def test_only_what_is_between_the_marks_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_table, "memory_table", lambda: "new")
    docs = tmp_path / "docs.md"
    docs.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    memory_table.write_docs(docs)
    assert docs.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
