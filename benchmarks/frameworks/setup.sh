#!/bin/sh
# The environments in which the trainers' own code runs on a CPU: four, since their pins exclude each other. About 5 GB
# and ten minutes, less for those that are there. One that cannot be built is said at the end, and the others are built.
#   PYTHON=python3.11 sh benchmarks/frameworks/setup.sh [trainers] [trl] [verifiers] [verifiers-0] [sources]
set -u
cd "$(dirname "$0")/../.."
failed=""
none=$(mktemp -d)
trap 'rm -rf "$none"' EXIT

install() { # environment, arguments of pip
    environment=$1
    shift
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# What an environment is made of is told by its function's text, which is kept beside it: when it changes, it is made
# again, and so is one whose making was cut short.
built() { # name, environment
    recipe=$(sed -n "/^$1() {/,/^}/p" benchmarks/frameworks/setup.sh)
    [ "$(cat "$2/.recipe" 2>"$none/said")" = "$recipe" ] && return
    echo "Setting up $2"
    rm -rf "$2"
    "${PYTHON:-python3}" -m venv "$2" && install "$2" "setuptools>=77" && "$1" "$2" \
        && install "$2" --no-build-isolation --editable . && printf '%s\n' "$recipe" >"$2/.recipe" \
        || failed="$failed $2"
}
