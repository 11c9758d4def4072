#!/usr/bin/env bash
# The quickstart on a bare machine: an environment in .venv, then a small language model that learns to reason better.
#
#     bash examples/quickstart.sh                 # about five minutes on two CPU cores, installs included
#     bash examples/quickstart.sh --seed 1        # arguments are those of `trl-credit quickstart`, see --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/install.sh .venv quickstart
exec .venv/bin/python -m trl_credit.toy "$@"
