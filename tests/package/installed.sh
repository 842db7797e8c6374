#!/usr/bin/env bash
# The wheel in dist/, installed into an empty environment and used from a folder outside the checkout:
# first as `pip install mapo-kernels` leaves it, then with what the demo needs.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
cd "$folder"
"${PYTHON:-python3}" -m venv venv
# Words of PIP_ARGS are arguments of their own.
install() { venv/bin/python -m pip install --quiet ${PIP_ARGS:-} -c "$root/constraints.txt" "$@"; }
wheel=$(echo "$root"/dist/*.whl)

install "$wheel"
venv/bin/python "$root/tests/package/installed.py" "$root"
venv/bin/mapo-kernels --version
venv/bin/mapo-kernels doctor
if venv/bin/mapo-kernels demo --steps 5 2>message; then
    echo "the demo ran without its extra" && exit 1
fi
grep "pip install .*mapo-kernels\[demo\]" message

install "$wheel[demo]"
venv/bin/mapo-kernels demo --steps 5 --out demo
ls demo
echo "installed.sh: the wheel works"
