#!/usr/bin/env bash
# setup_te_standin.sh [PYTHON]: puts what requirements/te-cpu.txt lists into .build/te, a folder of its own beside every
# environment, for tests/te. Unchanged pins: nothing is done. Silent unless it fails.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-$root/.venv/bin/python}
pins=$root/requirements/te-cpu.txt
target=$root/.build/te
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

mkdir -p "$root/.build"
exec 9>"$root/.build/te.lock" # two test runs at once: the second waits, then finds the stamp
if command -v flock >/dev/null; then flock 9; fi
stamp=$({ cat "$pins"; "$python" -c 'import sys; print(sys.version_info[:2])'; } | cksum)
if [ "$(cat "$target/stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

rm -rf "$target" "$target.new"
"$python" -m pip install --quiet --no-deps --target "$target.new" -r "$pins" >"$root/.build/te.log" 2>&1 || {
  tail -n 15 "$root/.build/te.log" >&2
  echo "setup_te_standin.sh: pip install -r requirements/te-cpu.txt failed; whole log: .build/te.log" >&2
  exit 1
}
echo "$stamp" >"$target.new/stamp"
mv "$target.new" "$target"
