import errno
import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from spo import tracking
from spo.__main__ import COMMANDS, main
from spo.commands.stage import only_one, run_stage, settings
from spo.config import load_config
from spo.errors import DataError, SpoError
from spo.pipeline import STAGES
from spo.runtime.environment import require_repository
from spo.tracking import NullTracker

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped configuration; stages run in the current folder."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", _never)
    return tmp_path


def _never(*arguments: Any) -> None:
    """Stands for what would make the tests' own process another."""
    pytest.fail(f"execv{arguments}")


class Recorder(NullTracker):
    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def log_params(self, params: Any) -> None:
        self.params = params


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    @contextmanager
    def start(*_: Any, **__: Any) -> Iterator[Recorder]:
        yield recorder

    monkeypatch.setattr(tracking, "start", start)
    monkeypatch.setattr("spo.commands.stage.set_up_libraries", lambda: None)
    monkeypatch.setattr("spo.commands.stage.require", lambda *_: None)
    monkeypatch.setattr("spo.commands.stage.show_results", lambda *_: None)
    return recorder


@pytest.fixture
def stage(tracker: Recorder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Every stage's module replaced by one that notes its call."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def fake_module(name: str) -> SimpleNamespace:
        def run(config: Any, *rest: Any, root: Path, tracker: Any) -> None:
            assert root == Path()
            assert isinstance(tracker, Recorder)
            calls.append((name, (config.profile, *rest)))

        return SimpleNamespace(run=run)

    monkeypatch.setattr(importlib, "import_module", fake_module)
    promote = SimpleNamespace(register_released=lambda *_: None)  # what follows a report
    monkeypatch.setitem(sys.modules, "spo.commands.promote", promote)
    return calls


def run_fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(run=run))


@pytest.mark.parametrize("name", [name for name in STAGES if not STAGES[name].item])
def test_a_stage_runs_with_the_profile_of_params_yaml(project: Path, stage: list[Any], name: str) -> None:
    assert main([name]) == 0
    assert stage == [(f"spo.stages.{name}", ("tiny",))]


def test_align_takes_the_methods_name(project: Path, stage: list[Any], tracker: Recorder) -> None:
    assert main(["align", "spo"]) == 0
    assert stage == [("spo.stages.align", ("tiny", "spo", 0))]
    assert tracker.params["align"]["beta"] == load_config(project).align["spo"].beta
    assert tracker.params["training_seed"] == 0


def test_a_seed_is_trained_as_asked_and_else_the_first_of_the_training_seeds(project: Path, stage: list[Any]) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(re.sub(r"(?m)^training_seeds: .*", "training_seeds: [3, 4]", text))
    assert main(["align", "spo"]) == main(["align", "spo", "--seed", "7"]) == 0
    assert [call[-1] for _, call in stage] == [3, 7]


def test_a_second_run_of_a_stage_is_refused_and_another_profile_runs_beside_it(
    project: Path, stage: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "configs" / "mine.yaml").write_text((project / "configs" / "tiny.yaml").read_text())
    with only_one(load_config(project), ("prepare",), project):
        assert main(["prepare"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: prepare of profile tiny is running already: process {os.getpid()} on ")
        assert main(["prepare", "--profile", "mine"]) == 0
    assert main(["prepare"]) == 0
    assert stage == [("spo.stages.prepare", ("mine",)), ("spo.stages.prepare", ("tiny",))]


@pytest.mark.usefixtures("stage")
def test_restart_forgets_what_a_stopped_run_had_saved(project: Path) -> None:
    state = project / ".cache" / "state" / "tiny" / "train_preference" / "pixel" / "00000001" / "values.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    assert main(["train_preference", "pixel"]) == 0
    assert state.exists()
    assert main(["train_preference", "pixel", "--restart"]) == 0
    assert not state.exists()


def test_a_name_with_a_hyphen_is_the_same_stage(project: Path, stage: list[Any]) -> None:
    assert main(["train-preference", "pixel"]) == main(["train_preference", "pixel"]) == 0
    assert stage == [("spo.stages.train_preference", ("tiny", "pixel"))] * 2


def test_the_option_profile_overrides_params_yaml(project: Path, stage: list[Any]) -> None:
    (project / "configs" / "mine.yaml").write_text((project / "configs" / "tiny.yaml").read_text())
    assert main(["prepare", "--profile", "mine"]) == 0
    assert stage == [("spo.stages.prepare", ("mine",))]


def test_a_stage_closes_with_one_line_that_tells_its_time(
    project: Path, stage: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["align", "spo"])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("align spo --seed 0: done in ")
    assert captured.out.count("\n") == 1


@pytest.mark.usefixtures("tracker")
def test_a_users_mistake_is_one_line_and_code_1(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fails_with(monkeypatch, DataError("no.txt is missing"))
    assert main(["prepare"]) == 1
    assert capsys.readouterr().err == "error: no.txt is missing\n"


@pytest.mark.usefixtures("tracker")
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "smaller batch"),
        (MemoryError(), "smaller batch"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "'runs/a'; make this path readable"),
    ],
)
def test_what_the_machine_lacks_is_one_line_with_the_remedy(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, remedy: str
) -> None:
    run_fails_with(monkeypatch, error)
    assert main(["prepare"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and remedy in said and said.count("\n") == 1


@pytest.mark.usefixtures("tracker")
@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("shapes differ")])
def test_other_errors_of_the_system_are_not_hidden(
    project: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run_fails_with(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["prepare"])


@pytest.mark.usefixtures("tracker")
def test_an_interrupt_is_code_130(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_fails_with(monkeypatch, KeyboardInterrupt())
    assert main(["prepare"]) == 130


@pytest.mark.usefixtures("tracker")
def test_a_bug_of_ours_is_not_hidden(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_fails_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["prepare"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["align", "nosuch"], "align nosuch: profile tiny has no 'nosuch'; it has ['d3po', "),
        (["train_preference", "nosuch"], "profile tiny has no 'nosuch'; it has ['latent', 'pixel']"),
        (["prepare", "--profile", "nosuch"], "profile 'nosuch' has no"),
        (["mlflow-ui"], "there are no runs"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["nosuch"], ["align"], ["train_preference"], ["prepare", "--nosuch"], ["import-preference-model"]]
)
def test_wrong_arguments_are_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("Usage: python -m spo")


@pytest.mark.parametrize("command", [*STAGES, *(command.__name__.replace("_", "-") for command in COMMANDS)])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: python -m spo {command} ")
    assert main(["--help"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [command]]
    assert not line.endswith("...")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prepar"], "Did you mean 'prepare'"),
        (["train-preferences"], "Did you mean 'train_preference'"),
        (["prepare", "--profil", "tiny"], "--profile"),
    ],
)
def test_a_mistyped_name_is_told_with_the_likely_one(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spo {version('spo')}\n"


def test_exports_method_and_checkpoint_exclude_each_other() -> None:
    assert main(["export", "--format", "merged", "--out", "new", "--method", "spo", "--checkpoint", "a"]) == 2


def test_a_stages_settings_are_its_own_sections() -> None:
    config = load_config(ROOT, "tiny")
    own = settings(config, "train_preference", "latent")
    assert set(own) == {"seed", "model", "sampling", "labels", "train_preference"}
    assert own["train_preference"]["kind"] == "latent"
    assert settings(config, "align", "spo")["align"]["method"] == "spo"
    assert settings(config, "report") == {}


def repro_with(code: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    Path(".git").mkdir()
    calls: list[dict[str, Any]] = []

    def run_group(command: list[str], environment: dict[str, str]) -> int:
        calls.append({"command": command, "env": environment})
        return code

    monkeypatch.setattr("spo.commands.pipeline.run_group", run_group)
    Path("data").symlink_to(ROOT / "data")
    return calls


def test_repro_outside_of_git_names_the_remedy(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repro_with(0, monkeypatch)
    (project / ".git").rmdir()
    assert main(["repro"]) == 1
    error = capsys.readouterr().err
    assert "is in no git repository, which DVC needs; run `dvc config core.no_scm true`" in error
    assert error.count("\n") == 1
    (project / ".dvc").mkdir()
    (project / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    require_repository(project)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_prompt_that_is_no_utf8_is_told(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, os.fsdecode(b"a \xff cat")]) == 1
    assert capsys.readouterr().err.startswith("error: the prompt 'a \\udcff cat' is no UTF-8")


def test_a_locale_without_a_character_shows_its_number(tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "spo", "generate", "x", "--profile", os.fsencode("猫")]
    shutil.copy(ROOT / "params.yaml", tmp_path)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: profile '\\udce7")
    assert done.stderr.count(b"\n") == 1


def test_repro_runs_dvc_with_this_python_and_one_pipeline_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = repro_with(0, monkeypatch)
    (project / "runs/tiny/report").mkdir(parents=True)
    (project / "runs/tiny/report/summary.txt").write_text("SPO wins.\n")
    assert main(["repro", "--jobs", "1"]) == 0
    [call] = calls
    assert call["command"] == [sys.executable, "-m", "dvc", "repro"]
    assert call["env"]["SPO_PIPELINE_RUN"]
    assert call["env"]["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "SPO wins."
    for what in ("runs/tiny/report/report.html", "runs/tiny/evaluate/images", "runs/tiny/evaluate/lora", "make ui"):
        assert any(what in line for line in lines)


@pytest.mark.parametrize("force", [False, True])
def test_repro_with_several_jobs_ends_with_a_plain_run_of_dvc(
    project: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    calls = repro_with(0, monkeypatch)
    groups: list[list[str]] = []

    def run_side_by_side(items: list[str], *, jobs: int, environment: dict[str, str], force: bool) -> int:
        assert jobs == 3 and environment["SPO_PIPELINE_RUN"]
        groups.append(items)
        return 0

    monkeypatch.setattr("spo.commands.side_by_side.run_side_by_side", run_side_by_side)
    (project / "runs/tiny/report").mkdir(parents=True)
    (project / "runs/tiny/report/summary.txt").write_text("SPO wins.\n")
    assert main(["repro", "--jobs", "3", *(["--force"] if force else [])]) == 0
    names = [[item.partition("@")[0] for item in items] for items in groups]
    expected = [["prepare"], ["train_preference"] * 2, ["align"] * 3, ["evaluate"], ["report"]]
    assert names == (expected if force else expected[:-1])
    [call] = calls
    assert call["command"] == [sys.executable, "-m", "dvc", "repro"]


def test_a_stage_starts_as_many_processes_as_repro_asks_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, list[str]]] = []
    monkeypatch.setattr("spo.commands.stage.require", lambda *_: None)
    monkeypatch.setattr("spo.commands.stage.launch", lambda how, what: started.append((how.num_processes, what)) or 0)
    monkeypatch.setenv("SPO_PROCESSES", "2")
    assert main(["evaluate"]) == 0
    assert started == [(2, ["evaluate", "--profile", "tiny"])]


def test_repro_leaves_dvc_s_outputs_alone_where_something_is_missing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = repro_with(0, monkeypatch)
    (project / "data").unlink()
    assert main(["repro"]) == 1
    error = capsys.readouterr().err
    assert re.match(
        r"error: prepare.prompts.source: .* does not exist; .* more: `python -m spo check --quick`\)\n$", error
    )
    assert calls == []


def test_repro_that_fails_is_code_1(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repro_with(255, monkeypatch)
    assert main(["repro", "--jobs", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: the pipeline stopped (dvc's exit code 255)")


def test_a_mistake_shows_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spo", "prepare"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: params.yaml is missing; run from the project's folder\n"


def test_a_busy_port_of_the_runs_page_is_told_before_anything_starts(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "mlflow").mkdir()
    (project / "mlflow" / "mlflow.db").touch()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert main(["mlflow-ui", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: port {port} cannot be used")
    assert error.count("\n") == 1
    assert not (project / "mlflow" / "ui.json").exists()


@pytest.mark.usefixtures("tracker")
def test_evaluate_before_align_says_what_to_run_first_in_one_line(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("test", "validation"):
        file = project / f"runs/tiny/prepare/prompts/{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a small red cross\n" * 200)
    assert main(["evaluate"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "error: runs/tiny/align/spo/seed-0 holds no checkpoints; run `python -m spo align spo --seed 0`"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("  spo:", "  sppo:"), "methods names ['spo'], but align has only"),
        (("empty_captions:", "empty_caption:"), "align.diffusion_dpo.empty_caption: unknown key"),
    ],
)
def test_a_typo_in_a_method_s_key_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], said: str
) -> None:
    path = project / "configs" / "tiny.yaml"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    assert main(["check", "--quick"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: configs/tiny.yaml: ")
    assert said in error
    assert error.count("\n") == 1


def test_the_usage_names_the_command_as_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed, shown in (("/venv/bin/spo", "spo"), ("/src/spo/__main__.py", "python -m spo")):
        monkeypatch.setattr(sys, "argv", [typed, "--help"])
        assert main() == 0
        assert capsys.readouterr().out.startswith(f"Usage: {shown} [OPTIONS]")


def test_libraries_are_silent_before_a_stage_checks_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def require(*_: object) -> None:
        calls.append("require")
        raise SpoError("no inputs")

    monkeypatch.setattr("spo.commands.stage.set_up_libraries", lambda: calls.append("set up"))
    monkeypatch.setattr("spo.commands.stage.require", require)
    with pytest.raises(SpoError, match="no inputs"):
        run_stage(STAGES["align"], "tiny", "spo")
    assert calls == ["set up", "require"]
