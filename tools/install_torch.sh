#!/usr/bin/env bash
# Installs the torch of constraints.txt into an environment, before anything that depends on torch: a resolver left to
# itself would fetch gigabytes of CUDA packages. Usage: tools/install_torch.sh path/to/python
set -euo pipefail
python=$1
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")
pip=("$python" -m pip install --disable-pip-version-check --quiet --no-compile)

if "$python" -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
    echo "torch $version is installed"
elif [ "$(uname -s)" != Linux ]; then
    "${pip[@]}" "torch==$version"
elif nvidia-smi -L >/dev/null 2>&1; then
    echo "NVIDIA GPU found: installing torch $version with CUDA"
    "${pip[@]}" "torch==$version"
else
    echo "no NVIDIA GPU: installing torch $version for the CPU"
    # --no-deps: the index of CPU builds mirrors other packages in versions of its own; dpfast's installation adds them.
    "${pip[@]}" --no-deps "torch==$version+cpu" 2>/dev/null ||
        "${pip[@]}" --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu"
fi
