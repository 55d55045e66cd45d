#!/bin/sh
# Create an environment with the project's requirements at their tested versions, but without the project itself. Its
# code comes from the folder in which commands run, so a changed line does not install torch again.
#
# usage: install.sh VENV PART...     in a folder with pyproject.toml and constraints.txt; a PART is `project` or an extra
# environment: PYTHON (default: python3); pip's variables, such as PIP_EXTRA_INDEX_URL for CPU-only wheels of torch
set -eu
venv=${1:?usage: install.sh VENV PART...}
shift
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
"${PYTHON:-python3}" "$(dirname "$0")/requirements.py" "$@" >"$wanted"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement "$wanted"
