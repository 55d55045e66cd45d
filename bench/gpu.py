"""Everything that is to be known of a GPU, in one command for the few minutes that one is at hand.

    python -m bench.gpu --plan                                      # the rows, and what they should take on an H100
    python -m bench.gpu --minutes 9 --out FOLDER                    # measure; FOLDER/gpu.json and FOLDER/gpu.md
    python -m bench.gpu --only spo switch                           # some rows, by name or by its beginning
    python -m bench.gpu --device cpu --size small --minutes 3       # every row in small, to try it out
    python -m bench.gpu --write-docs FOLDER/gpu.json [...]          # the figures of these runs into docs/performance.md

Random weights of the true shapes are made on the GPU itself, and nothing is fetched. The rows run in the order of their
value. What goes wrong in one, memory that is short included, costs that row alone; both files are written anew after
every row, and when the minutes are over what is left is marked as skipped. Ends with code 0 where no row failed, with 1
where one did, and with 2 where nothing could be measured.

A bare machine with torch and numpy lacks these wheels. Collect them for its Python, here 3.12, on one with a network:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        -c constraints.txt --dest wheels \\
        accelerate annotated-types certifi diffusers h11 httpcore2 httpx2 huggingface_hub idna packaging peft pillow \\
        psutil pydantic pydantic_core PyYAML regex requests ruamel.yaml safetensors tokenizers tqdm transformers \\
        truststore typing-inspection typing_extensions urllib3

They are some 40 MB. Install them there: `pip install --no-index --no-deps --target site wheels/*.whl`,
and run with `PYTHONPATH=site:.`. A test runs every row with these alone (tests/bench/test_gpu.py).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_report import write_docs
from bench.gpu_rows import ROWS, Row, chosen
from bench.gpu_run import Deadline, Results, run_rows
from spo.errors import SpoError, one_line
from spo.runtime.stopping import Stopped, stoppable

START = time.monotonic()  # the minutes count from here: importing torch takes some of them
DOCS = Path("docs/performance.md")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")  # there is no network, and to look for one takes time
    try:
        if options.write_docs:
            write_docs(options.write_docs, DOCS)
            return 0
        rows = chosen(options.only)
        if options.plan:
            from bench.gpu_plan import plan

            print(plan(rows, minutes=options.minutes))
            return 0
        return measure(rows, options)
    except SpoError as error:
        print(f"error: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"error: the package {error.name} is missing; see bench/gpu.py for the wheels", file=sys.stderr)
    return 2


def measure(rows: Sequence[Row], options: argparse.Namespace) -> int:
    """Run the rows; the command's exit code."""
    from bench.gpu_bench import Bench, facts

    deadline = Deadline(START if __name__ == "__main__" else time.monotonic(), options.minutes)
    bench = Bench(options.device, options.size, deadline)
    results = Results(options.out, {**facts(bench), "minutes": options.minutes})
    print(f"bench.gpu: {results.head['machine']}; {len(rows)} rows in {options.minutes:g} minutes", file=sys.stderr)
    try:
        with stoppable():
            code = run_rows(rows, bench, results)
    except Stopped as stop:  # between rows
        code = stop.exit_code
    print(results.markdown())
    print(f"\nall figures: {results.json_file}", file=sys.stderr)
    return code


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1440")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="from the command's start to its end")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"some of: {' '.join(row.name for row in ROWS)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "small"], default="full", help="small: shapes to try it out with")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--plan", action="store_true", help="only say what would be done, and how long it should take")
    parser.add_argument("--write-docs", type=Path, nargs="+", metavar="JSON", help=f"put these figures into {DOCS}")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
