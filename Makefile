# Each target sets up what it needs. PYTHON is only asked for venv and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Not here: vllm_sampler.py needs vLLM and a model, report_page.py Chromium, real/, proof/ and most of paper/ fetch models and ratings.
APART := benchmarks/environment.py benchmarks/vllm_sampler.py benchmarks/report_page.py \
	$(addprefix benchmarks/paper/,curves.py hacking.py miscalibration.py other_n.py raw_reward.py rewind.py \
	rollouts.py win_rates.py)
TABULAR := $(addprefix benchmarks/tabular/,world.py trainers.py options.py offline.py plots.py)
BENCHMARKS := $(filter-out $(APART),$(sort $(wildcard benchmarks/*.py benchmarks/paper/*.py))) $(TABULAR)

.DELETE_ON_ERROR:
.PHONY: help setup demo test check docs wheel bench frameworks trl-tests clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## install everything into .venv; again only when pyproject.toml or constraints.txt changed

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "calibrated-rewards needs Python 3.11 or newer, got " + sys.version)'
	@echo 'Setting up $(VENV): some minutes the first time.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) setuptools
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(READY)  ## a real language model calibrated, trained and evaluated, and a page that says so; in demo/
	$(BIN)/calibrated-rewards demo

# One thread: the arrays are small, and the two cores of a small machine are better used by two runs.
test wheel: export OMP_NUM_THREADS = 1
# Compiled modules are written, whatever the environment says: hundreds of processes import the package and pytest's plugins.
test wheel: export PYTHONDONTWRITEBYTECODE =
test: $(READY)  ## the test suite, doctests included
	$(BIN)/pytest $(IN_PARALLEL)

check: $(READY)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## the documentation site, in site/; a warning is an error
	$(BIN)/mkdocs build

# The tests come out of the sdist, whose package is deleted, into a folder that knows nothing of this one: whatever
# the wheel lacks is missed there. `build` makes the wheel from the sdist. Doctests import every module of it; of the
# tests, which `make test` has run on the same code, those run again that need entry points, adapters or data files.
OUT_OF_THE_WHEEL := $(addprefix tests/,cli adapters evaluation table test_api.py test_packaging.py)
OUT_OF_THE_WHEEL += $(addprefix tests/,test_saved_by_earlier_versions.py reward server/test_server_process.py)
wheel: $(READY)  ## sdist, wheel from the sdist, its contents, doctests and tests against it in a new environment
	rm -rf dist build
	$(BIN)/python -m build --no-isolation
	$(BIN)/check-wheel-contents dist
	@set -eux; outside=$$(mktemp -d); trap 'rm -rf "$$outside"' EXIT; \
	$(PYTHON) -m venv "$$outside/venv"; \
	"$$outside/venv/bin/python" $(PIP_INSTALL) "$$(echo dist/*.whl)[test]"; \
	tar -xzf dist/*.tar.gz -C "$$outside" --strip-components 1; \
	rm -r "$$outside/calibrated_rewards" "$$outside"/*.egg-info; \
	cd "$$outside"; \
	venv/bin/python -c 'import calibrated_rewards as it; print(it.__file__); assert "site-packages" in it.__file__'; \
	venv/bin/pytest $(IN_PARALLEL) --ignore-glob '*/calibrated_rewards/adapters' $(OUT_OF_THE_WHEEL) --pyargs calibrated_rewards

bench: $(READY)  ## every benchmark and figure of the docs; minutes each, results in benchmarks/results
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

# Environments of their own, in .venv-frameworks*: the trainers pin other versions than we do.
frameworks: export OMP_NUM_THREADS = 1
frameworks: export HF_HUB_OFFLINE = 1
frameworks: $(READY)  ## the trainers' own loading code with our adapters: gigabytes, minutes; results in benchmarks/results
	@PYTHON=$(PYTHON) sh benchmarks/frameworks/setup.sh; made=$$?; $(BIN)/python benchmarks/frameworks/run.py && exit $$made

# TRL is a checkout of its repository: its tests, and the trainers beside them, not those of the environment.
trl-tests: export OMP_NUM_THREADS = 1
trl-tests: $(READY)  ## TRL's own GRPO and RLOO tests with our rewards in them: make trl-tests TRL=path/to/trl
	@test -n "$(TRL)" || { echo 'make trl-tests needs a checkout of TRL: make trl-tests TRL=path/to/trl' >&2; exit 2; }
	$(BIN)/python benchmarks/trl_tests/run.py "$(TRL)"

clean:  ## remove builds and caches; the environment stays
	rm -rf dist build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)*' -prune -exec rm -rf {} +
