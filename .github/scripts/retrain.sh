#!/usr/bin/env bash
# Retrain in this checkout: fetch from the DVC remote, run the stages that have changed, store the results.
#
# usage: retrain.sh FOLDER
#   Writes report.md, report.html and changes.patch to FOLDER. The patch has the new dvc.lock and figures. It is empty
#   if nothing has changed.
# environment:
#   ENGINE    dvc: run without a server (default). prefect: run spo/full on the server at PREFECT_API_URL, with a worker
#             on this machine
#   PROFILE   one of configs/*.yaml; it is written to params.yaml (default: the one in params.yaml)
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
    [[ -n ${!name:-} ]] || unset "$name" # a workflow passes an unset variable as empty
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
    echo "There is no default DVC remote, so nothing is fetched or stored."
fi

if [[ $engine == prefect ]]; then
    prefect --no-prompt deploy --all # so that runs use this checkout
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
