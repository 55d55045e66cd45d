#!/usr/bin/env bash
# Retrain in this checkout: fetch what DVC has, run what has changed, store what came of it.
#
# usage: retrain.sh FOLDER
#   FOLDER gets report.md, report.html and changes.patch: the new dvc.lock and figures, empty where nothing has changed.
# environment:
#   ENGINE    dvc: without a server (default); prefect: spo/full, on the server that PREFECT_API_URL names and a worker
#             on this machine
#   PROFILE   one of configs/*.yaml, written to params.yaml (default: the one that stands there)
set -euo pipefail
folder=${1:?usage: retrain.sh FOLDER}
engine=${ENGINE:-dvc}
profile=${PROFILE:-}

fail() {
    echo "error: $1" >&2
    exit 2
}
case $engine in dvc | prefect) ;; *) fail "ENGINE is '$engine'; use dvc or prefect" ;; esac
[[ -f dvc.yaml && -f params.yaml ]] || fail "$PWD has no dvc.yaml or no params.yaml; run from the project's folder"
[[ -z $profile || -f configs/$profile.yaml ]] || fail "PROFILE is '$profile'; configs/$profile.yaml is missing"
for name in PREFECT_API_URL MLFLOW_TRACKING_URI AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; do
    [[ -n ${!name:-} ]] || unset "$name" # a workflow's empty variable means none
done
[[ $engine == dvc || -n ${PREFECT_API_URL:-} ]] || fail "ENGINE=prefect needs PREFECT_API_URL, such as http://127.0.0.1:4200/api"

export PATH="$PWD/.venv/bin:$PATH" DVC_NO_ANALYTICS=true
mkdir -p "$folder"
[[ -z $profile ]] || sed -i "s/^profile:.*/profile: $profile/" params.yaml
profile=$(sed -n 's/^profile: *\([A-Za-z0-9_-]*\).*/\1/p' params.yaml)

if [[ -n $(dvc config core.remote 2>/dev/null || true) ]]; then
    remote=yes
    dvc pull --allow-missing
else
    remote=
    echo "There is no default DVC remote: nothing is fetched before and nothing stored after."
fi

if [[ $engine == prefect ]]; then
    prefect --no-prompt deploy --all # runs happen in this checkout
    prefect deployment run spo/full --watch
else
    SPO_PIPELINE_RUN=${GITHUB_RUN_ID:+github-$GITHUB_RUN_ID} dvc repro
fi
[[ -z $remote ]] || dvc push

git add -- dvc.lock params.yaml runs
git diff --cached --binary HEAD -- dvc.lock params.yaml runs >"$folder/changes.patch"
report=runs/$profile/report
{
    # shellcheck disable=SC2016  # the backticks are Markdown's
    printf '## Retrained: profile `%s`\n\n```\n' "$profile"
    cat "$report/summary.txt"
    printf '```\n\n'
    dvc metrics diff --md --targets "$report/metrics.json"
} >"$folder/report.md"
cp "$report/report.html" "$folder/report.html"
[[ -z ${GITHUB_STEP_SUMMARY:-} ]] || cat "$folder/report.md" >>"$GITHUB_STEP_SUMMARY"
