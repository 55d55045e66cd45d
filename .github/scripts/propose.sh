#!/usr/bin/env bash
# Open a pull request with the dvc.lock and figures from retrain.sh, and comment the report on it. If a pull request
# brought this commit, comment the report there, too. The report ends with the sample pictures.
#
# usage: propose.sh FOLDER     in a clean checkout of the retrained commit; FOLDER is the one that retrain.sh wrote
# environment: BASE, the branch to merge into (default: main); GH_TOKEN, for gh; GITHUB_REPOSITORY, OWNER/NAME, for the
#   address of the pictures (without it, none are shown)
set -euo pipefail
folder=${1:?usage: propose.sh FOLDER}
base=${BASE:-main}
[[ -f $folder/report.md && -f $folder/changes.patch ]] || {
    echo "error: $folder has no report.md or no changes.patch; run retrain.sh first" >&2
    exit 2
}

head=$(git rev-parse HEAD)
report=$(mktemp)
trap 'rm -f "$report"' EXIT
head -c 60000 "$folder/report.md" >"$report" # a comment has at most 65536 characters

show_samples() { # of the checked-out commit, which GitHub has
    local profile picture
    profile=$(sed -n 's/^profile: *\([A-Za-z0-9_-]*\).*/\1/p' params.yaml)
    picture=runs/$profile/evaluate/samples.png
    if [[ -n ${GITHUB_REPOSITORY:-} && -f $picture ]]; then
        printf '\n\n![The base above, then each method](%s/%s/blob/%s/%s?raw=true)\n' \
            "${GITHUB_SERVER_URL:-https://github.com}" "$GITHUB_REPOSITORY" "$(git rev-parse HEAD)" "$picture" >>"$report"
    fi
}

comment_on_the_cause() {
    for number in $(gh api "repos/{owner}/{repo}/commits/$head/pulls" --jq '.[].number'); do
        gh pr comment "$number" --body-file "$report"
    done
}

if [[ ! -s $folder/changes.patch ]]; then
    show_samples
    comment_on_the_cause
    echo "Nothing has changed: there is nothing to merge."
    exit 0
fi
branch=retrain/${head:0:12}
git switch --quiet --create "$branch"
# ignores everything else in the patch
git apply --index --include=dvc.lock --include=params.yaml --include='runs/*' "$folder/changes.patch"
git -c user.name="github-actions[bot]" -c user.email="41898282+github-actions[bot]@users.noreply.github.com" \
    commit --quiet --message "Retrain at ${head:0:12}"
gh auth setup-git
git push --quiet --force origin "$branch"
show_samples
comment_on_the_cause
url=$(gh pr list --head "$branch" --state open --json url --jq '.[].url')
if [[ -z $url ]]; then
    url=$(gh pr create --base "$base" --head "$branch" --title "Retrain at ${head:0:12}" \
        --body "The models that dvc.lock names are in the DVC remote. Merge to make them this branch's.")
fi
gh pr comment "$url" --body-file "$report"
echo "$url"
