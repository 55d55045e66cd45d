#!/bin/sh
# Start a service by its name, or run any command in the project's folder.
#
# usage: entrypoint.sh prefect-server | mlflow-server | buckets NAME... | worker [POOL] | COMMAND...
set -eu
here=$(dirname "$0")
echo "${1:-}" >"${SPO_SERVICE_FILE:-/tmp/spo-service}" # healthcheck.py reads it

if [ -f dvc.yaml ] && [ ! -e .git ] && [ ! -e .dvc/config.local ]; then
    printf '[core]\n    no_scm = true\n' >.dvc/config.local # the image's copy of the project is no git repository
fi

case ${1:-} in
prefect-server)
    exec prefect server start --host "${PREFECT_SERVER_API_HOST:-0.0.0.0}" --port "${PREFECT_SERVER_API_PORT:-4200}"
    ;;
mlflow-server) # all other settings are MLFLOW_* variables
    : "${MLFLOW_BACKEND_STORE_URI:?is not set, such as postgresql+psycopg2://USER:PASSWORD@postgres/mlflow}"
    : "${MLFLOW_ARTIFACTS_DESTINATION:?is not set, such as s3://mlflow}"
    : "${MLFLOW_SERVER_ALLOWED_HOSTS:?is not set, such as mlflow:5000,127.0.0.1:5000}"
    exec mlflow server --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" --workers 1 --serve-artifacts
    ;;
buckets)
    shift
    exec python "$here/buckets.py" "$@"
    ;;
worker)
    pool=${2:-spo-gpu}
    if ! prefect work-pool inspect "$pool" >/dev/null 2>&1; then
        prefect --no-prompt work-pool create "$pool" --type process
        prefect work-pool set-concurrency-limit "$pool" 1
    fi
    prefect --no-prompt deploy --all
    exec prefect worker start --pool "$pool" --with-healthcheck
    ;;
*)
    exec "$@"
    ;;
esac
