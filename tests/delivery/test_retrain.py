"""The scripts of a retrain, for real but for GitHub: a project with a DVC remote, and its clone on a runner."""

import json
from pathlib import Path

import pytest

from tests.delivery.conftest import ROOT, environment, shell

SCRIPTS = ROOT / ".github/scripts"
FILES = {
    "params.yaml": "profile: tiny\nmethods: [spo]\n",
    "configs/tiny.yaml": "seed: 0\n",
    "configs/sd15.yaml": "seed: 0\n",
    "data/prompts/own.txt": "a red cross\n",
    "dvc.yaml": """
stages:
  train:
    cmd: mkdir -p runs/${profile}/train && wc -l < data/prompts/own.txt > runs/${profile}/train/model
    deps: [data/prompts]
    outs: ["runs/${profile}/train/model"]
  report:
    cmd: sh report.sh runs/${profile}
    deps: [report.sh, "runs/${profile}/train/model"]
    outs:
      - runs/${profile}/report/report.html
      - runs/${profile}/report/summary.txt: {cache: false}
      - runs/${profile}/evaluate/samples.png: {cache: false}
    metrics: ["runs/${profile}/report/metrics.json": {cache: false}]
""",
    "report.sh": "mkdir -p $1/report $1/evaluate; cd $1/report; n=$(cat ../train/model)\n"
    "echo $n pictures > ../evaluate/samples.png\n"
    'echo "{\\"prompts\\": $n}" > metrics.json\n'
    "echo '<html>' > report.html; echo \"SPO learned from $n prompts.\" > summary.txt\n",
}
GH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$GH_LOG"
for argument; do [[ ! -f $argument ]] || cat "$argument" >> "$GH_LOG"; done
case "$*" in
api*) echo 7 ;;
"pr list"*) [[ ! -e $GH_LOG.open ]] || echo https://github.com/o/r/pull/8 ;;
"pr create"*) touch "$GH_LOG.open"; echo https://github.com/o/r/pull/8 ;;
esac
"""  # stands in for GitHub: notes what it is asked, and answers as gh does


class Retrain:
    """`origin`, a bare repository with a DVC remote beside it, and `runner`, its clone."""

    def __init__(self, folder: Path):
        self.origin, self.runner, self.log, self.out = (folder / name for name in ("origin", "runner", "log", "out"))
        fake = folder / "bin" / "gh"
        fake.parent.mkdir()
        fake.write_text(GH)
        fake.chmod(0o755)
        self.variables = environment(self.runner, GH_LOG=str(self.log), GH_TOKEN="none", BASE="main")
        self.variables["PATH"] = f"{fake.parent}:{self.variables['PATH']}"
        made = folder / "made"
        for name, text in FILES.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(text)
        shell(
            f"git init -q -b main && dvc init -q && dvc remote add -q --default store {folder / 'store'}"
            " && dvc repro -q && dvc push -q && git add -A && git commit -qm made"
            f" && git clone -q --bare . {self.origin}",
            made,
        )
        shell(f"git clone -q {self.origin} {self.runner}", folder)

    def script(self, name: str, **more: str) -> str:
        return shell(f"{SCRIPTS / name} {self.out}", self.runner, {**self.variables, **more})


@pytest.fixture(scope="module")
def retrain(tmp_path_factory: pytest.TempPathFactory) -> Retrain:
    return Retrain(tmp_path_factory.mktemp("retrain"))


def test_a_commit_that_changes_nothing_fetches_and_proposes_nothing(retrain: Retrain) -> None:
    said = retrain.script("retrain.sh")
    assert "Data and pipelines are up to date." in said
    assert (retrain.runner / "runs/tiny/train/model").read_text() == "1\n"  # from the remote
    assert (retrain.out / "changes.patch").read_text() == ""
    assert "Nothing has changed" in retrain.script("propose.sh")
    assert "pr create" not in retrain.log.read_text()


def test_a_new_prompt_is_trained_on_stored_and_proposed(retrain: Retrain, tmp_path: Path) -> None:
    with (retrain.runner / "data/prompts/own.txt").open("a") as file:
        file.write("a blue ring\n")
    shell("git commit -qam prompt && git push -q origin main", retrain.runner)
    summary = tmp_path / "summary.md"
    retrain.script("retrain.sh", GITHUB_STEP_SUMMARY=str(summary), GITHUB_RUN_ID="12")
    report = (retrain.out / "report.md").read_text()
    assert "## Retrained: profile `tiny`" in report
    assert "SPO learned from 2 prompts." in report
    assert "| prompts" in report  # DVC's table of what moved: from 1 to 2
    assert summary.read_text() == report
    assert (retrain.out / "report.html").exists()

    head = shell("git rev-parse HEAD", retrain.runner).strip()
    shell("git stash -q", retrain.runner)  # the clean checkout of another job
    with (retrain.out / "changes.patch").open("a") as patch:  # a runner that has been taken over
        patch.write(
            "diff --git a/.github/workflows/evil.yml b/.github/workflows/evil.yml\nnew file mode 100644\n"
            "--- /dev/null\n+++ b/.github/workflows/evil.yml\n@@ -0,0 +1 @@\n+on: push\n"
        )
    assert retrain.script("propose.sh", GITHUB_REPOSITORY="o/r").endswith("https://github.com/o/r/pull/8\n")
    branch = f"retrain/{head[:12]}"
    changed = shell(f"git diff --name-only {head} {branch}", retrain.origin).split()
    figures = ["report/metrics.json", "report/summary.txt"]
    assert changed == ["dvc.lock", "runs/tiny/evaluate/samples.png", *(f"runs/tiny/{name}" for name in figures)]
    asked = retrain.log.read_text()
    for request in (
        f"api repos/{{owner}}/{{repo}}/commits/{head}/pulls",
        "pr comment 7 --body-file",
        "auth setup-git",
        f"pr create --base main --head {branch}",
        "pr comment https://github.com/o/r/pull/8 --body-file",
    ):
        assert request in asked
    assert asked.count("SPO learned from 2 prompts.") == 2
    proposed = shell(f"git rev-parse {branch}", retrain.origin).strip()
    picture = f"https://github.com/o/r/blob/{proposed}/runs/tiny/evaluate/samples.png?raw=true"
    assert asked.count(f"![The base above, then each method]({picture})") == 2

    elsewhere = tmp_path / "elsewhere"
    shell(f"git clone -q --branch {branch} {retrain.origin} {elsewhere} && cd {elsewhere} && dvc pull -q", tmp_path)
    assert (elsewhere / "runs/tiny/train/model").read_text() == "2\n"
    assert json.loads((elsewhere / "runs/tiny/report/metrics.json").read_text()) == {"prompts": 2}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ENGINE": "make"}, "error: ENGINE is 'make'; use dvc or prefect"),
        ({"PROFILE": "sdxxl"}, "error: PROFILE is 'sdxxl'; configs/sdxxl.yaml is missing"),
        ({"ENGINE": "prefect", "PREFECT_API_URL": ""}, "error: ENGINE=prefect needs PREFECT_API_URL"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_done(
    retrain: Retrain, settings: dict[str, str], said: str, tmp_path: Path
) -> None:
    line = f"! {SCRIPTS / 'retrain.sh'} {tmp_path / 'out'}"
    assert said in shell(line, retrain.runner, {**retrain.variables, **settings})
    assert not (tmp_path / "out").exists()


def test_outputs_of_several_profiles_are_pushed_together_and_each_comes_back(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    made, other = Retrain(tmp_path / "own").runner, tmp_path / "other"
    shell(f"git tag run-tiny && dvc pull -q && dvc remote modify store url {tmp_path / 'store'}", made)
    shell("sed -i s/tiny/sd15/ params.yaml && dvc repro -q && git add -A && git commit -qm sd15", made)
    shell("git tag run-sd15 && dvc push -q --all-tags", made)
    shell(f"git clone -q {made} {other} && cd {other} && dvc fetch -q --all-tags", tmp_path)
    for profile in ("sd15", "tiny"):
        shell(f"git checkout -q run-{profile} -- dvc.lock params.yaml configs runs && dvc checkout -q", other)
        assert (other / f"runs/{profile}/train/model").read_text() == "1\n"
        assert "up to date" in shell("dvc status", other)
