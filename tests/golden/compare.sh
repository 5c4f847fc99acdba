#!/usr/bin/env bash
# Makes the golden outcome of a commit and of the working tree on this machine, and compares them.
set -euo pipefail
base=$1
python=${PYTHON:-python3}
top=$(cd "$(dirname "$0")/../.." && pwd)
scratch=$(mktemp -d)
trap 'git -C "$top" worktree remove --force "$scratch/base" 2>/dev/null; rm -rf "$scratch"' EXIT
git -C "$top" worktree add --quiet --detach "$scratch/base" "$base"
# Both take the same recorded measurements, so that only the code differs.
cp "$top/tests/golden/measurements.json" "$scratch/base/tests/golden/"
(cd "$scratch/base" && PYTHONPATH="$scratch/base" "$python" tests/golden/produce.py "$scratch/a" >/dev/null)
(cd "$top" && PYTHONPATH="$top" "$python" tests/golden/produce.py "$scratch/b" >/dev/null)
"$python" "$top/tests/golden/produce.py" --compare "$scratch/a" "$scratch/b"
