#!/usr/bin/env bash
# gpu_kit.sh DIR [CUDA]: puts into DIR what a machine with a GPU, Python 3.12, a CUDA build of torch and no network needs
# beside them for `make gpu`: this project as it is committed, the wheels of its pins, Transformer Engine, and install.sh.
# CUDA is the major version that the machine's torch is built for: 13 (default) or 12. Runs where there is a network;
# needs git and a gigabyte of disk. Then, on the machine:
#     DIR/install.sh FOLDER    # unpacks the project into FOLDER, with a .venv over the machine's own torch
#     make -C FOLDER gpu
#   PYTHON      a Python 3.12, whose pip fetches (default python3.12)
#   PIECE_MIB   files are cut into pieces of at most this (default 55), for ways that limit the size of a file
#   EXTENSION   a wheel of transformer-engine-torch, compiled against the machine's torch (see docs/install-cluster.md):
#               no index has one. Without it the kit leaves Transformer Engine out, and `make gpu` runs with local layers.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kit=${1:?usage: gpu_kit.sh DIR [CUDA]}
cuda=${2:-13}
python=${PYTHON:-python3.12}
case $cuda in 12 | 13) ;; *) echo "gpu_kit.sh: CUDA $cuda: there is 12 and 13" >&2; exit 1 ;; esac
if [ -n "${EXTENSION:-}" ] && [ ! -f "$EXTENSION" ]; then
  echo "gpu_kit.sh: EXTENSION=$EXTENSION is no file" >&2
  exit 1
fi
"$python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))' || {
  echo "gpu_kit.sh: PYTHON=$python is not a Python 3.12 with pip" >&2
  exit 1
}
mkdir -p "$kit/wheels"
kit=$(cd "$kit" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() { # wheels alone: what an index has as source only is built here (pure Python)
  "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$kit/wheels" "$@"
}
pins() { # FILE: its requirements for Python 3.12 but torch and triton, which the machine has
  "$python" - "$1" <<'END'
import sys
from pip._vendor.packaging.requirements import Requirement

for line in open(sys.argv[1]):
    if line := line.split("#")[0].strip():
        requirement = Requirement(line)
        environment = {"python_version": "3.12", "platform_system": "Linux"}
        if requirement.name in ("torch", "triton", "transformer-engine", "flash-attn", "wandb", "ruff"):
            continue
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            print(requirement)
END
}

: >"$work/pins.txt"
for name in build trainer trainer-nodeps dev te-cpu; do pins "$root/requirements/$name.txt" >>"$work/pins.txt"; done
# the pins' own dependencies, as pip resolves them for Python 3.12; megatron-bridge's are the container's, and left out
grep -v '^megatron-bridge' "$work/pins.txt" >"$work/resolved.txt"
"$python" -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
  --target "$work/none" --report "$work/report.json" -r "$work/resolved.txt"
"$python" - "$work/report.json" >"$work/all.txt" <<'END'
import json
import sys

for item in json.load(open(sys.argv[1]))["install"]:
    name, version = item["metadata"]["name"], item["metadata"]["version"]
    if not name.lower().startswith(("torch", "triton", "nvidia-", "cuda-")):
        print(f"{name}=={version}")
END
fetch -r "$work/all.txt"
fetch "$(grep '^megatron-bridge' "$work/pins.txt")"
if [ -n "${EXTENSION:-}" ]; then
  version=$(sed -n 's/^transformer-engine.*==//p' "$root/requirements/cluster.txt")
  fetch "transformer-engine==$version" "transformer-engine-cu$cuda==$version"
  cp "$EXTENSION" "$kit/wheels/"
else
  echo "gpu_kit.sh: no EXTENSION given: the kit has no Transformer Engine, and \`make gpu\` will leave FP8 out" >&2
  rm -f "$kit"/wheels/transformer_engine*
fi

git -C "$root" archive --format=tar.gz --prefix=project/ -o "$kit/project.tar.gz" HEAD
cat >"$kit/install.sh" <<'END'
#!/usr/bin/env bash
# install.sh FOLDER: see gpu_kit.sh. PYTHON: an interpreter of Python 3.12 that imports torch with CUDA (default python3).
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:?usage: install.sh FOLDER}
mkdir -p "$folder/.build/kit"
for first in "$kit"/wheels/*.piece-aa; do
  [ -e "$first" ] || continue
  whole=$(basename "${first%.piece-aa}")
  cat "${first%aa}"* >"$folder/.build/kit/$whole"
done
for wheel in "$kit"/wheels/*.whl; do cp "$wheel" "$folder/.build/kit/"; done
(cd "$folder/.build/kit" && sha256sum --quiet --check "$kit/sums")
tar -xzf "$kit/project.tar.gz" --strip-components=1 -C "$folder"
"${PYTHON:-python3}" -m venv --system-site-packages "$folder/.venv"
python=$folder/.venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps "$folder"/.build/kit/*.whl
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable "$folder"
rm -rf "$folder/.build/kit"
"$folder/.venv/bin/gtpo-megatron" doctor || true
echo "now: make -C $folder gpu"
END
chmod +x "$kit/install.sh"
(cd "$kit/wheels" && sha256sum ./*.whl >"$kit/sums")
find "$kit/wheels" -name '*.whl' -size +"${PIECE_MIB:-55}"M -print0 | while IFS= read -r -d '' large; do
  split --bytes "${PIECE_MIB:-55}M" --suffix-length 2 "$large" "$large.piece-"
  rm "$large"
done
echo "$(find "$kit" -type f | wc -l) files, $(du -sm "$kit" | cut -f1) MB in $kit"
