#!/usr/bin/env bash
# Make an environment with this package in it:   bash examples/install.sh [FOLDER] [EXTRAS]
# FOLDER is `.venv` and EXTRAS `quickstart` unless given. A second call with the same arguments does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-.venv} extras=${2:-quickstart}

stamp="$folder/.installed-$(cat pyproject.toml <(echo "$extras") | cksum | cut -d' ' -f1)"
[ -e "$stamp" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed, and $python is $("$python" --version). Set PYTHON to another one." >&2
    exit 1
}
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
if ! "$folder/bin/python" -c "import torch" 2>/dev/null; then
    echo "Installing PyTorch ..."
    if command -v nvidia-smi >/dev/null; then
        pip torch
    else # the CPU build is a tenth of the default one
        pip "torch==2.13.0+cpu" 2>/dev/null || pip torch --index-url https://download.pytorch.org/whl/cpu || pip torch
    fi
fi
echo "Installing trl-credit[$extras] ..."
DS_BUILD_OPS=0 pip --editable ".[$extras]"
touch "$stamp"
