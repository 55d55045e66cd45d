"""`make test-portable` runs each setting in turn, names the one that fails, and ends as it should."""

import pytest

from tests import portable


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings that were run; "4 threads" fails."""
    settings: list[str] = []

    def passes(setting: str, options: list[str]) -> bool:
        assert options == ["-k", "align"]
        settings.append(setting)
        return setting != "4 threads"

    monkeypatch.setattr(portable, "passes", passes)
    return settings


def test_every_setting_runs_though_one_fails_and_that_one_is_named(
    ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert portable.main(["--", "-k", "align"]) == 1
    assert ran == list(portable.SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAILED")] == ["FAILED: 4 threads, 0 s"]
    assert len(lines) == len(portable.SETTINGS)


def test_one_setting_may_be_named_and_an_unknown_one_is_refused(
    ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert portable.main(["busy", "--", "-k", "align"]) == 0
    assert portable.main(["8 threads"]) == 2
    assert ran == ["busy"]
    assert "no setting ['8 threads']; there are ['as it is'" in capsys.readouterr().err


def test_what_it_runs_is_there() -> None:
    assert [path for path in portable.TESTS if not (portable.ROOT / path).exists()] == []
