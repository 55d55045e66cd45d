"""The commands: `python -m spo STAGE` runs one stage, `python -m spo repro` whatever of the pipeline has changed.

A mistake of the user's ends with one line and exit code 1, wrong arguments with 2, Ctrl-C with 130, SIGTERM with 143.
"""

import argparse
import importlib
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spo.commands.preflight import Finding, require
from spo.config import Config, LaunchConfig, load_config
from spo.errors import SpoError, is_disk_full, is_out_of_memory, one_line
from spo.runtime.locking import locked
from spo.runtime.stopping import Stopped, run_group, stoppable

STAGES = {  # in the pipeline's order; the last is not part of it
    "prepare": "check prompts and preferences and split them",
    "train_preference": "train the step-aware preference model",
    "align": "align the diffusion model by one method",
    "evaluate": "compare base and aligned models on held-out prompts",
    "report": "write the report",
    "pretrain": "make the embedded default's models and data anew",
}
STAGES_CHECKED = ("prepare", "train_preference", "align", "evaluate")  # at their start, for what later ones lack
SHARED_OUT = ("train_preference", "align", "evaluate")  # among the processes of `launch`
LAUNCHED = "SPO_LAUNCHED"  # environment variable of the processes that `launch` started: they start no more
RESUMED = ("train_preference", "align")  # go on from where they were stopped
SECTIONS = {  # of the configuration, that a stage reads: what its run is tracked with
    "prepare": ("seed", "prepare"),
    "train_preference": ("seed", "model", "sampling", "train_preference"),
    "align": ("model", "sampling"),
    "evaluate": ("model", "sampling", "evaluate"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = _parser().parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stoppable():
            return options.run(options) or 0
    except SpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        if is_disk_full(error):
            mend = "make room and run the same command again; what was being written is not there in part"
        elif is_out_of_memory(error):
            mend = "use a smaller batch or resolution, or a smaller model; `python -m spo check` measures its memory"
        elif isinstance(error, OSError) and error.filename is not None:
            mend = "see to it that this path can be read, or written, and run the same command again"
        else:
            raise
        print(f"error: {one_line(error)}; {mend}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"ended by {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_stage(options: argparse.Namespace) -> int:
    """One stage in the current folder, tracked, with a closing line that tells its time."""
    stage: str = options.stage
    method: str | None = getattr(options, "name", None)
    seed: int | None = getattr(options, "seed", None)
    root = Path()
    config = load_config(root, options.profile)
    if method is not None and method not in config.align:
        raise SpoError(f"align {method}: profile {config.profile} has no such method; it has {sorted(config.align)}")
    if method is not None and seed is None:
        seed = config.training_seeds[0]
    if stage in STAGES_CHECKED:
        require(config, stage, root)
    if config.launch.num_processes > 1 and stage in SHARED_OUT and not {"RANK", LAUNCHED} & set(os.environ):
        return launch(config.launch, options.arguments)
    label = stage if method is None else f"{stage} {method} --seed {seed}"
    _settle()
    from spo import tracking
    from spo.runtime import distributed

    distributed.join()

    run = importlib.import_module(f"spo.stages.{stage}").run
    start = time.monotonic()
    job = (stage, *(() if method is None else (method, f"seed-{seed}")))
    with only_one(config, job, root):
        if getattr(options, "restart", False):
            shutil.rmtree(root / config.state_folder(*job), ignore_errors=True)
        with tracking.start(config, stage, root, method=method, seed=seed) as tracker:
            tracker.log_params(settings(config, stage, method, seed))
            run(config, *(() if method is None else (method, seed)), root=root, tracker=tracker)
    if stage == "report":
        from spo.commands.promote import register_released

        register_released(config, root)
    if os.environ.get("RANK", "0") == "0":
        print(f"{label}: done in {time.monotonic() - start:.1f} s", flush=True)
    distributed.leave()
    return 0


def launch(settings: LaunchConfig, arguments: Sequence[str]) -> int:
    """This very command in several processes, one a GPU, started by accelerate; its exit code.

    Where one of them fails, accelerate ends the others.
    """
    _settle()
    import torch

    count = str(settings.num_processes)
    if settings.accelerate_config is not None:
        starter = ["accelerate.commands.launch", "--num_processes", count, "--config_file", settings.accelerate_config]
    elif torch.cuda.is_available():
        options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        starter = ["accelerate.commands.launch", "--num_processes", count, *options]
    else:  # where accelerate would start but one
        starter = ["torch.distributed.run", "--standalone", "--nproc_per_node", count]
    command = [sys.executable, "-m", *starter, "-m", "spo", *arguments]
    return run_group(command, {**os.environ, LAUNCHED: "1"})


def only_one(config: Config, job: Sequence[str], root: Path) -> AbstractContextManager[None]:
    """Held while a job (stage, method, seed) runs; LockedError where another process holds it.

    Of the processes of one run the first has it.
    """
    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    lock = root / ".cache" / "locks" / config.profile / f"{'-'.join(job)}.lock"
    return locked(lock, f"{' '.join(job)} of profile {config.profile}")


def settings(config: Config, stage: str, method: str | None = None, seed: int | None = None) -> dict[str, Any]:
    """The sections of the configuration that a stage reads; of a method also the training seed."""
    values = config.model_dump(mode="json", include=set(SECTIONS.get(stage, ())))
    if method is not None:
        values |= {"align": config.align[method].model_dump(mode="json"), "training_seed": seed}
    return values


def repro(options: argparse.Namespace) -> int:
    """Let DVC run the stages that have changed, under one parent run; then tell what came of it and where it lies."""
    from spo import tracking

    config = load_config()
    interpreter = Path(sys.executable).parent  # so that `python` in dvc.yaml is this one
    environment = {
        "DVC_NO_ANALYTICS": "true",
        tracking.PIPELINE_RUN: uuid.uuid4().hex,
        **os.environ,
        "PATH": f"{interpreter}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    start = time.monotonic()
    command = [sys.executable, "-m", "dvc", "repro", *(["--force"] if options.force else [])]
    code = run_group(command, environment)
    if code:
        raise SpoError(f"the pipeline stopped (dvc's exit code {code}); the lines above tell which stage and why")
    summary = (config.folder("report") / "summary.txt").read_text(encoding="utf-8").strip()
    print(f"\n{summary}\n")
    for what, where in {
        "report": config.folder("report") / "report.html",
        "images": config.folder("evaluate") / "images",
        "LoRA weights": config.folder("evaluate") / "lora",
        "runs": "`make ui`, then http://127.0.0.1:5000",
    }.items():
        print(f"{what:<13}{where}")
    print(f"{'this took':<13}{time.monotonic() - start:.0f} s")
    return 0


def check(options: argparse.Namespace) -> int:
    """Say what would end a run, before it is started; 1 where something would."""
    config = load_config(Path(), options.profile)
    _print_finding(Finding("configuration", True, f"configs/{config.profile}.yaml and params.yaml", ()))
    _settle()
    from spo.commands.check import check

    good = check(config, Path(), _print_finding, quick=options.quick)
    print(f"profile {config.profile} {'can run' if good else 'cannot run yet: mend the lines marked FAIL'}")
    return 0 if good else 1


def _print_finding(finding: Finding) -> None:
    print(f"{'ok  ' if finding.good else 'FAIL'}  {finding.what:<34} {finding.detail}", flush=True)


def mlflow_ui(options: argparse.Namespace) -> None:
    """Serve the tracked runs to this machine; this process becomes the server."""
    from spo import tracking

    uri = tracking.store()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise SpoError(f"there are no runs at {uri} yet; run `python -m spo repro` first")
    if left := tracking.send_unsent():
        print(f"warning: {left} runs still wait in mlflow/unsent: {tracking.masked(uri)} is away", file=sys.stderr)
    if uri.startswith("http"):
        print(f"the runs are at {tracking.masked(uri)}")
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    print(f"http://127.0.0.1:{options.port} (stop with Ctrl-C)", flush=True)
    server = ["server", "--host", "127.0.0.1", "--port", str(options.port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *server, "--backend-store-uri", uri])


def promote(options: argparse.Namespace) -> None:
    """Register the evaluated LoRA, and let it be champion if it has earned it; either decision ends well."""
    config = load_config(Path(), options.profile)
    _settle()
    from spo import tracking
    from spo.commands import promote

    with tracking.spoken():
        promote.run(config, method=options.method, against_base=options.against_base)


def generate(options: argparse.Namespace) -> None:
    """Write pictures of a prompt and say where they are."""
    config = load_config(Path(), options.profile)
    _settle()
    from spo.evaluation.sample_images import Sampler, show_one

    sampler = Sampler.of(config, options.sampler, steps=options.steps, guidance=options.guidance, eta=options.eta)
    wanted = {"model": options.model, "seed": options.seed, "num": options.num, "out": options.out}
    for path in show_one(config, options.prompt, **wanted, sampler=sampler, root=Path()):
        print(path)


def compare(options: argparse.Namespace) -> None:
    """Write pictures of a prompt by the base and by others, side by side."""
    config = load_config(Path(), options.profile)
    _settle()
    from spo.evaluation.sample_images import Sampler, show_side_by_side

    sampler = Sampler.of(config, options.sampler, steps=options.steps, guidance=options.guidance, eta=options.eta)
    wanted = {"models": options.model, "seed": options.seed, "num": options.num, "out": options.out}
    print(show_side_by_side(config, options.prompt, **wanted, sampler=sampler, root=Path()))


def import_preference_model(options: argparse.Namespace) -> None:
    """Make a published step-aware preference model a folder that `train_preference.checkpoint` can name."""
    _new(options.out)
    _settle()
    from spo.preference.checkpoint import import_published

    import_published(options.file, options.clip, options.out, processor=options.processor)
    print(f"{options.out}: name it as train_preference.checkpoint in a profile")


def export_preference_model(options: argparse.Namespace) -> None:
    """Write a trained preference model as the file that the published code reads."""
    _new(options.out)
    _settle()
    from spo.preference.checkpoint import export_published

    export_published(options.folder, options.out)
    print(options.out)


def export(options: argparse.Namespace) -> None:
    """Write a trained model for use elsewhere: a LoRA for diffusers or web user interfaces, or a merged pipeline."""
    config = load_config(profile=options.profile)
    out: Path = options.out
    if options.format == "kohya" and out.suffix != ".safetensors":
        raise SpoError(f"--out {out}: --format kohya writes one file; end its name in .safetensors")
    _new(out)
    _settle()
    from spo.evaluation.resolve_model import resolve_model
    from spo.models.load import build
    from spo.models.policy import export, load_policy

    source = resolve_model(options.checkpoint or options.method, config)
    if source.lora is None:
        raise SpoError(
            f"there is nothing to export: {source.description}; run `python -m spo evaluate`, or name a --checkpoint"
        )
    denoiser = build(config.model, config.sampling, "cpu")
    load_policy(denoiser, source.lora)
    export(denoiser, options.format, out)
    print(f"{out}: {options.format} of {source.description}")


def _new(out: Path) -> None:
    """What is written as a whole would replace what stands at its place; that is for its owner to remove."""
    if out.exists():
        raise SpoError(f"--out {out} exists already; remove it, or name another place")


def _settle() -> None:
    """What every stage wants of its process: quiet libraries, and no slow arithmetic on denormal numbers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import torch
    import transformers

    torch.set_flush_denormal(True)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    """The commands and their options; each sets `run`, which takes the parsed options."""
    parser = argparse.ArgumentParser(prog="python -m spo", description="Step-aware Preference Optimization.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for stage, purpose in STAGES.items():
        aliases = [stage.replace("_", "-")] if "_" in stage else []
        command = commands.add_parser(stage, aliases=aliases, help=purpose, description=purpose)
        if stage == "align":
            command.add_argument("name", metavar="NAME", help="of the method: a key of the profile's align section")
            command.add_argument("--seed", type=int, help="of the training (default: the first of training_seeds)")
        command.add_argument("--profile", help="one of configs/*.yaml (default: the one in params.yaml)")
        if stage in RESUMED:
            command.add_argument("--restart", action="store_true", help="forget what a stopped run had saved")
        command.set_defaults(run=run_stage, stage=stage)

    purpose = "run the stages that have changed, in order"
    command = commands.add_parser("repro", help=purpose, description=purpose)
    command.add_argument("--force", action="store_true", help="run all stages, changed or not")
    command.set_defaults(run=repro)

    purpose = "find out in a minute what would end a run after hours"
    command = commands.add_parser("check", help=purpose, description=purpose)
    command.add_argument("--profile", help="one of configs/*.yaml (default: the one in params.yaml)")
    command.add_argument("--quick", action="store_true", help="look at settings, files and disk alone; run nothing")
    command.set_defaults(run=check)

    of_model = "an evaluated method, a run's folder, a LoRA's file or folder, OWNER/NAME, models:/NAME@ALIAS or base"
    purpose = "make pictures of a prompt"
    command = commands.add_parser("generate", help=purpose, description=purpose)
    command.add_argument("--model", help=f"{of_model} (default: the evaluated LoRA, else the base)")
    _add_sampling(command, num=1)
    command.set_defaults(run=generate)

    purpose = "put pictures of a prompt by the base and by aligned models side by side"
    command = commands.add_parser("compare", help=purpose, description=purpose)
    command.add_argument(
        "--model", action="append", default=[], help=f"{of_model}; may be given several times (default: as in generate)"
    )
    _add_sampling(command, num=4)
    command.set_defaults(run=compare)

    purpose = "register the evaluated LoRA; make it champion if it beats the present one"
    command = commands.add_parser("promote", help=purpose, description=purpose)
    command.add_argument("--method", metavar="NAME", help="whose LoRA (default: promote.method, else the first)")
    command.add_argument("--against-base", action="store_true", help="leave the present champion out of account")
    command.add_argument("--profile", help="one of configs/*.yaml (default: the one in params.yaml)")
    command.set_defaults(run=promote)

    purpose = "browse the tracked runs"
    command = commands.add_parser("mlflow-ui", help=purpose, description=purpose)
    command.add_argument("--port", type=int, default=5000)
    command.set_defaults(run=mlflow_ui)

    purpose = "write a trained model for diffusers, for web user interfaces, or merged into its base"
    command = commands.add_parser("export", help=purpose, description=purpose)
    command.add_argument("--format", choices=("diffusers", "kohya", "merged"), required=True)
    command.add_argument(
        "--out", metavar="PATH", type=Path, required=True, help="a folder; of kohya a .safetensors file"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--method", metavar="NAME", help="whose evaluated LoRA it is (default: the profile's first)")
    which.add_argument("--checkpoint", metavar="LORA", help="a run's folder, a LoRA's file or folder, a hub name")
    command.add_argument("--profile", help="one of configs/*.yaml (default: the one in params.yaml)")
    command.set_defaults(run=export)

    purpose = "make a published preference model (.bin) a folder of ours"
    command = commands.add_parser("import-preference-model", help=purpose, description=purpose)
    command.add_argument("file", metavar="FILE", type=Path)
    command.add_argument(
        "--clip", metavar="REPO", required=True, help="CLIP whose configuration it has: name or folder"
    )
    command.add_argument("--processor", metavar="REPO", help="where the tokenizer is, if not there: name or folder")
    command.add_argument("--out", metavar="FOLDER", type=Path, required=True)
    command.set_defaults(run=import_preference_model)

    purpose = "write a preference model of ours as a published one (.bin)"
    command = commands.add_parser("export-preference-model", help=purpose, description=purpose)
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.add_argument("--out", metavar="FILE", type=Path, required=True)
    command.set_defaults(run=export_preference_model)
    return parser


def _add_sampling(command: argparse.ArgumentParser, *, num: int) -> None:
    """What the commands that make pictures take."""
    command.add_argument("prompt", metavar="PROMPT")
    command.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next one")
    command.add_argument("--num", type=int, default=num, help=f"of pictures (default: {num})")
    command.add_argument("--out", type=Path, default=Path("pictures"), help="folder (default: pictures)")
    command.add_argument(
        "--sampler", metavar="NAME", help="one of the profile's evaluate.samplers (default: the first)"
    )
    command.add_argument("--steps", type=int, help="instead of the sampler's own, as are the next two")
    command.add_argument("--guidance", type=float, help="guidance scale")
    command.add_argument("--eta", type=float, help="0: no noise is added while sampling; 1: DDPM's noise")
    command.add_argument("--profile", help="one of configs/*.yaml (default: the one in params.yaml)")


if __name__ == "__main__":
    sys.exit(main())
