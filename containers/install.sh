#!/usr/bin/env bash
# install.sh [--pins]: installs the trainer's pins and this project into an image that has torch, Transformer Engine,
# flash-attn and apex compiled for each other, and leaves those alone. --pins: only lists what it would install.
# Both container files call it; it runs as well in such an image by hand.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

pins() { # FILE: its requirements for this Python without what the image brings, one a line, no comments, no markers
  "$python" - "$root/requirements/$1.txt" <<'END'
import sys

from packaging.requirements import Requirement

for line in open(sys.argv[1]):
    if line := line.split("#")[0].strip():
        requirement = Requirement(line)
        if requirement.name not in ("torch", "triton") and (requirement.marker is None or requirement.marker.evaluate()):
            requirement.marker = None
            print(requirement)
END
}

if [ "${1:-}" = --pins ]; then
  pins build
  pins trainer
  pins trainer-nodeps
  exit
fi
# NVIDIA's images hold packages at their own versions by a constraint file: torch must stay, our pins must not be refused
before=$("$python" -c 'import torch; print(torch.__version__)')
export PIP_CONSTRAINT='' PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
constraints=$(mktemp)
echo "torch==$before" >"$constraints"
{ pins build; pins trainer; } >"$constraints.pins"
pins trainer-nodeps >"$constraints.nodeps"
"$python" -m pip install -c "$constraints" -r "$constraints.pins"
"$python" -m pip install --no-deps -r "$constraints.nodeps"
"$python" -m pip install --no-deps --no-build-isolation "$root"
rm -f "$constraints" "$constraints.pins" "$constraints.nodeps"
after=$("$python" -c 'import torch; print(torch.__version__)')
if [ "$before" != "$after" ]; then
  echo "install.sh: the image's torch $before became $after; what is compiled against it will not load" >&2
  exit 1
fi
# imports with no GPU; what its kernels do is for `make gpu` to say
cd / && "$python" -c 'import torch, transformer_engine.pytorch, gtpo_megatron'
