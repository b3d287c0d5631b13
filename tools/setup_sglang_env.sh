#!/usr/bin/env bash
# setup_sglang_env.sh [VENV]: makes SGLang's own virtual environment (default .venv-sglang) for servers without a GPU,
# from requirements/sglang*.txt. Unchanged pins: nothing is done, in silence. Else it says what it is at on stderr;
# pip's log stands in VENV/setup.log. On GPUs take SGLang's container, or its own installation, of the pinned version instead, and name its
# interpreter in rollout.sglang.python.
#   PYTHON       the interpreter (3.11 or 3.12), default python3
#   TORCH_INDEX  another index for torch (PyTorch publishes one of CPU builds)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv-sglang}
python=${PYTHON:-python3}
complete=$root/requirements/sglang.txt
without_dependencies=$root/requirements/sglang-nodeps.txt

# A user's own Python paths and pip's --user would lead packages past the environment.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_REQUIRE_VIRTUALENV=0

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12) ;;
  *) echo "setup_sglang_env.sh: $python is Python $version; SGLang's pins are for 3.11 and 3.12 (set PYTHON)" >&2; exit 1 ;;
esac

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock" # two callers at once: the second waits, then finds the stamp
if command -v flock >/dev/null && ! flock -n 9; then
  echo "setup_sglang_env.sh: another call is installing $venv; waiting for it" >&2
  flock 9
fi
stamp=$({ cat "$complete" "$without_dependencies"; echo "$version ${TORCH_INDEX:-}"; } | cksum)
if [ "$(cat "$venv/stamp" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then exit 0; fi

rm -rf "$venv"
"$python" -m venv "$venv"
log=$venv/setup.log
install() {
  "$venv/bin/python" -m pip install "$@" >>"$log" 2>&1 || {
    tail -n 30 "$log" >&2
    echo "setup_sglang_env.sh: pip install $* failed; whole log: $log" >&2
    exit 1
  }
}
say() { echo "setup_sglang_env.sh: $1" >&2; }
say "making $venv for SGLang's servers, some minutes the first time (log: $log)"
say "1 of 4: torch"
install "$(grep '^torch==' "$complete")" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
say "2 of 4: SGLang's dependencies"
install -r "$complete"
say "3 of 4: SGLang and its router"
install --no-deps -r "$without_dependencies"
say "4 of 4: seeing that a server can be imported"
PYTHONPATH=$root/gtpo_megatron/rollout/sglang/cpu_stubs SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" \
  -c 'import sglang.srt.entrypoints.http_server, sglang_router' >>"$log" 2>&1 || {
  tail -n 15 "$log" >&2
  echo "setup_sglang_env.sh: installed, but the server cannot be imported; whole log: $log" >&2
  exit 1
}
echo "$stamp" >"$venv/stamp"
