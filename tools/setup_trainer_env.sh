#!/usr/bin/env bash
# setup_trainer_env.sh [VENV]: makes or updates the trainer's virtual environment (default .venv) from requirements/*.txt
# and installs this project into it. Unchanged pins: nothing is done. Silent unless something fails; pip's log stands in
# VENV/setup.log.
#   PYTHON       the interpreter (3.11 or 3.12); by default the first of python3.12, python3.11, python3 that fits
#   TORCH_INDEX  another index for torch (PyTorch publishes one of CPU builds)
#   PAIR         "next": the pins of Python 3.12 (the pair that clusters run) on whichever interpreter there is, into
#                .venv-next. For tests: Megatron declares that it needs 3.12; on 3.11 only `typing.override` is missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pair=${PAIR:-}
case $pair in
  "") venv=${1:-$root/.venv} ;;
  next) venv=${1:-$root/.venv-next} ;;
  *) echo "PAIR=$pair is unknown; there is: PAIR=next" >&2; exit 1 ;;
esac
requirements=$root/requirements

# A user's own Python paths and pip's --user would lead packages past the environment.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_REQUIRE_VIRTUALENV=0

fits() { # a pyenv shim exists and fails; Debian's python3 may lack ensurepip
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
    if fits "$candidate"; then echo "$candidate"; return; fi
  done
  if [ -n "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON is not a Python 3.11 or 3.12 with the venv module" >&2
  else
    echo "no Python 3.11 or 3.12 with the venv module found; install one (Debian: python3.11 and python3.11-venv)" >&2
    echo "or name it: make PYTHON=/path/to/python3.12 ..." >&2
  fi
  return 1
}

mkdir -p "$root/.build" "$(dirname "$venv")"
exec 9>"$root/.build/trainer-env.lock" # two makes at once: the second waits, then finds the stamp
if command -v flock >/dev/null; then flock 9; fi

if fits "$venv/bin/python" && [ -z "${PYTHON:-}" ]; then
  python=$venv/bin/python
else
  python=$(find_python)
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
inputs=("$requirements"/{build,trainer,trainer-nodeps,dev}.txt "$root/setup.py" "${BASH_SOURCE[0]}")
stamp=$({ cat "${inputs[@]}"; echo "$version $root ${TORCH_INDEX:-} $pair"; } | cksum)
if [ "$(cat "$venv/stamp" 2>/dev/null)" = "$stamp" ] && fits "$venv/bin/python"; then exit 0; fi

if ! fits "$venv/bin/python" || [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$version" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
rm -f "$venv/stamp"
log=$venv/setup.log
: >"$log"
install() {
  "$venv/bin/python" -m pip install "$@" >>"$log" 2>&1 || {
    tail -n 30 "$log" >&2
    echo "setup_trainer_env.sh: pip install $* failed; whole log: $log" >&2
    exit 1
  }
}
pins() { # the requirements of a file whose markers hold for the pair's Python, without the markers
  "$venv/bin/python" - "$1" "$([ "$pair" = next ] && echo 3.12 || echo "$version")" <<'END'
import sys
from pip._vendor.packaging.requirements import Requirement

path, python_version = sys.argv[1:]
for line in open(path):
    if line := line.split("#")[0].strip():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
            requirement.marker = None
            print(requirement)
END
}
chosen=$venv/pins.txt
without_dependencies=$venv/pins-nodeps.txt
pins "$requirements/trainer.txt" >"$chosen"
pins "$requirements/trainer-nodeps.txt" >"$without_dependencies"
foreign=() # options for packages that declare another Python than this one
if [ "$pair" = next ]; then
  foreign=(--ignore-requires-python)
  grep '^megatron-core==' "$chosen" >>"$without_dependencies" # what it needs (torch, numpy, packaging) comes with the rest
  sed -i '/^megatron-core==/d' "$chosen"
  cat >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'END'
"""megatron-core 0.19.2 imports `typing.override`, which Python has from 3.12 on: without it `import megatron.bridge` fails."""

import typing

if not hasattr(typing, "override"):
    typing.override = lambda method: method
END
fi
echo "installing the trainer's environment into $(basename "$venv") (some minutes the first time) ..."
# torch first and alone: what follows then finds it in place, and no dependency can choose another build
install "$(grep '^torch==' "$chosen")" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
install -r "$requirements/build.txt" -r "$chosen" -r "$requirements/dev.txt"
install --no-deps ${foreign[@]+"${foreign[@]}"} -r "$without_dependencies"
install --no-deps --no-build-isolation --editable "$root"
(cd / && "$venv/bin/python" -c 'import gtpo_megatron, torch, transformers' && [ -x "$venv/bin/gtpo-megatron" ]) >>"$log" 2>&1 || {
  tail -n 15 "$log" >&2
  echo "setup_trainer_env.sh: installed, but not into $venv: look for target or prefix in: pip config list" >&2
  exit 1
}
echo "$stamp" >"$venv/stamp"
