#!/bin/sh
# One environment for verl, OpenRLHF, ms-swift and SkyRL's gym on a CPU, and the sources of those that have no package.
# About 2 GB and three minutes. Their pins exclude each other, so each comes without its own.
#   PYTHON=python3.11 sh benchmarks/frameworks/setup.sh [.venv-frameworks]
set -eu
venv=${1:-.venv-frameworks}
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
${PYTHON:-python3} -m venv "$venv"
$pip "torch==2.13.0" "setuptools>=77"
$pip --no-deps "verl==0.9.1" "openrlhf==0.11.2" "skyrl-gym==0.4.0" "ms-swift==4.6.0"
$pip "tensordict>=0.8,<=0.10" "transformers>=5.5.3,<5.11,!=5.6.0" hydra-core "ray>=2.40" codetiming numpy pandas aiohttp \
    packaging dill sympy pylatexenc tqdm func_timeout requests pillow "datasets<4.8.5" modelscope "peft<0.21" json-repair \
    einops dacite msgspec colorlog fastapi uvicorn prometheus-client
$pip --no-build-isolation --editable .
# The commits whose code was read; without a network the four above are run all the same.
source_of() {
    folder="$venv/sources/$1"
    [ -d "$folder" ] && return
    git clone --quiet --filter=blob:none --no-checkout "https://github.com/$2" "$folder" \
        && git -C "$folder" checkout --quiet "$3" || { echo "no source of $1: left out" >&2; rm -rf "$folder"; }
}
source_of slime THUDM/slime 624b824a898ab0ec1fcb4d373004c7f3852bf515
source_of AReaL areal-project/AReaL cbff54d645d2cd8ee1f1c358a82f3f473588433d
source_of NeMo-RL NVIDIA-NeMo/RL 7ea279abfbeb698b092856d0dab61e7cf39bc909
