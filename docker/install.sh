#!/bin/sh
# Make an environment with what the project needs, at its tested versions, but without the project itself: its code
# comes from the folder that commands run in, so that a changed line does not install torch again.
#
# usage: install.sh VENV PART...     in a folder with pyproject.toml and constraints.txt; a PART is `project` or an extra
# environment: PYTHON (default: python3), and pip's own, such as PIP_EXTRA_INDEX_URL for CPU-only wheels of torch
set -eu
venv=${1:?usage: install.sh VENV PART...}
shift
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
"${PYTHON:-python3}" "$(dirname "$0")/requirements.py" "$@" >"$wanted"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement "$wanted"
