#!/usr/bin/env bash
# setup_sglang_env.sh [VENV]: makes SGLang's own virtual environment (default .venv-sglang), for servers without a GPU.
# PYTHON names the interpreter (3.11 or 3.12). Unchanged pins: nothing is done. Silent unless something fails; the log
# of pip stands in VENV/setup.log. On GPUs use SGLang's container or `pip install sglang` of the same version instead.
# pip's own variables hold: where the default index gives torch with CUDA, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$root/.venv-sglang}
python=${PYTHON:-python3}
pins=("$root/requirements/sglang.txt" "$root/requirements/sglang-nodeps.txt")

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12) ;;
  *) echo "setup_sglang_env.sh: $python is Python $version; SGLang's pins are for 3.11 and 3.12 (set PYTHON)" >&2; exit 1 ;;
esac

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock" # two callers at once: the second waits, then finds the stamp
flock 9
stamp=$(cat "${pins[@]}" "${BASH_SOURCE[0]}" <(echo "$version") | sha256sum | cut -d' ' -f1)
[ "$(cat "$venv/stamp" 2>/dev/null)" = "$stamp" ] && exit 0

rm -rf "$venv"
"$python" -m venv "$venv"
log=$venv/setup.log
install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >>"$log" 2>&1 || {
    tail -n 30 "$log" >&2
    echo "setup_sglang_env.sh: pip install $* failed; whole log: $log" >&2
    exit 1
  }
}
install -r "${pins[0]}"
install --no-deps -r "${pins[1]}"
echo "$stamp" >"$venv/stamp"
