#!/usr/bin/env bash
# setup_browser.sh: Debian's chromium, in which tests/analysis runs the program of the analysis page. Nothing is done where
# there is a chromium; needs root and apt otherwise.
set -euo pipefail
if command -v chromium >/dev/null; then exit 0; fi
log=$(mktemp)
install() {
  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium
}
install >"$log" 2>&1 || {
  tail -n 15 "$log" >&2
  echo "setup_browser.sh: chromium could not be installed; the page's program will not be tested" >&2
  exit 1
}
rm -f "$log"
