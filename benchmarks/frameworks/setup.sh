#!/bin/sh
# The environments in which the trainers' own code runs on a CPU: four, since their pins exclude each other. About 5 GB
# and ten minutes, less for those that are there. What cannot be built is said at the end, and the others are built.
#   PYTHON=python3.11 sh benchmarks/frameworks/setup.sh [frameworks|trl|verifiers|rubric|sources]...
set -u
cd "$(dirname "$0")/../.." || exit
lacking=""

pip() { # environment, arguments
    environment=$1
    shift
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# verl, OpenRLHF, ms-swift and SkyRL's gym: each comes without its own pins, which are for GPUs.
frameworks() {
    pip "$1" "torch==2.13.0" && pip "$1" --no-deps verl==0.9.1 openrlhf==0.11.2 skyrl-gym==0.4.0 ms-swift==4.6.0 \
        && pip "$1" "tensordict>=0.8,<=0.10" "transformers>=5.5.3,<5.11,!=5.6.0" hydra-core "ray>=2.40" codetiming numpy \
            pandas aiohttp packaging dill sympy pylatexenc tqdm func_timeout requests pillow "datasets<4.8.5" modelscope \
            "peft<0.21" json-repair einops dacite msgspec colorlog fastapi uvicorn prometheus-client
}

# The last TRL with a PPO trainer, and tinker-cookbook. Its 0.6.1 asks for a renderer package (tml-renderers) that not
# every index has; the parts that the adapter meets do not need it, so it comes with the dependencies of 0.5.8.
trl() {
    pip "$1" "torch==2.13.0" trl==1.12.0 tinker-cookbook==0.5.8 && pip "$1" --no-deps tinker-cookbook==0.6.1 tinker==0.38.0
}

verifiers() {
    pip "$1" verifiers==0.4.0
}

# The last verifiers whose rubrics take functions.
rubric() {
    pip "$1" verifiers==0.1.14
}

# An environment that is there and complete is left as it is: what it was made by is written into it at the end.
environment() { # function, folder
    recipe=$(sed -n "/^$1() {/,/^}/p" benchmarks/frameworks/setup.sh)
    [ -f "$2/recipe" ] && [ "$(cat "$2/recipe")" = "$recipe" ] && return
    echo "Setting up $2; pip may list what its packages pin and is left out on purpose."
    rm -f "$2/recipe"
    "${PYTHON:-python3}" -m venv --clear "$2" && pip "$2" "setuptools>=77" && "$1" "$2" \
        && pip "$2" --no-build-isolation --editable . && echo "$recipe" >"$2/recipe" || lacking="$lacking $2"
}

# The commit whose code was read, of those that no package index has.
source_of() { # name, repository, commit
    folder=.venv-frameworks-sources/$1
    [ -f "$folder/COMMIT" ] && [ "$(cat "$folder/COMMIT")" = "$3" ] && return
    rm -rf "$folder"
    git clone --quiet --filter=blob:none --no-checkout "https://github.com/$2" "$folder" \
        && git -C "$folder" checkout --quiet "$3" && echo "$3" >"$folder/COMMIT" || lacking="$lacking $folder"
}

for part in "${@:-all}"; do
    case $part in all | frameworks | trl | verifiers | rubric | sources) ;; *) lacking="$lacking $part" ;; esac
    case $part in all | frameworks) environment frameworks .venv-frameworks ;; esac
    case $part in all | trl) environment trl .venv-frameworks-trl ;; esac
    case $part in all | verifiers) environment verifiers .venv-frameworks-verifiers ;; esac
    case $part in all | rubric) environment rubric .venv-frameworks-rubric ;; esac
    case $part in all | sources)
        source_of slime THUDM/slime 624b824a898ab0ec1fcb4d373004c7f3852bf515
        source_of AReaL areal-project/AReaL cbff54d645d2cd8ee1f1c358a82f3f473588433d
        source_of NeMo-RL NVIDIA-NeMo/RL 7ea279abfbeb698b092856d0dab61e7cf39bc909
        ;;
    esac
done
[ -z "$lacking" ] || { echo "These could not be made, and what needs them is left out:$lacking" >&2; exit 1; }
