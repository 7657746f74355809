# Two commands do everything: `make repro` and `make test`. Each makes the environment first.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
INSTALLED_TESTS := $(VENV)/.installed-tests
INSTALLED_PAGE := $(VENV)/.installed-page
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Usage statistics of the tools are off unless you turn them on.
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= 1
# What is compiled is kept, or every process would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# Tests side by side, a process for each core, each with one thread. Those of kills and of servers wait a tenth of their
# time, but a third process on two cores spends more on its own imports than that. What shares a project stays in one
# process (tests/conftest.py says what).
#
# They make tens of thousands of small files and flush thousands, which costs a tenth as much in memory, where there is
# room: half a GiB, and two where many tests fail, as only what passed is removed at once. Some run programs from there.
CORES := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 5 ? n : 5)))
FREE := $(shell df -Pk /dev/shm 2>/dev/null | awk 'END {print $$4 + 0}')
RUNS := $(shell grep -Eqs '^[^ ]+ /dev/shm .*noexec' /proc/mounts || echo programs)
IN_MEMORY := $(if $(TMPDIR),,$(if $(RUNS),$(shell [ $(FREE) -gt 3000000 ] && echo TMPDIR=/dev/shm)))
PYTEST := $(IN_MEMORY) OMP_NUM_THREADS=1 python -m pytest --dist loadfile --no-loadscope-reorder -n $(CORES)

.PHONY: repro test test-fast test-services ui page bench notebooks lint install install-tests clean

repro: install ## run every stage that is not up to date
	@latentloom check
	@dvc repro
	@latentloom summary

test: install-tests ## every test
	$(PYTEST)

test-fast: install-tests ## unit tests alone, without the slow ones
	$(PYTEST) -m "not pipeline and not fault and not slow and not service"

test-services: install-tests ## tests with Postgres, S3, a browser, DVC's queue, a served model
	$(PYTEST) -m service

ui: install ## MLflow's pages on this machine; PORT=... for another port than 5000
	@latentloom ui $(if $(PORT),--port $(PORT))

page: $(INSTALLED_PAGE) ## a page to draw on, on this machine; PORT=... for another port than 7860
	@latentloom page $(if $(PORT),--port $(PORT))

bench: install-tests ## how fast the caches are, beside others; half an hour on an idle machine
	@for script in benchmarks/*.py; do echo "== $$script"; PYTHONPATH=src TQDM_DISABLE=1 python $$script || exit 1; done

notebooks: install-tests ## execute the notebooks and store what they show, small enough for git
	python tools/run_notebooks.py

lint: install-tests
	ruff check .
	ruff format --check .

install: $(INSTALLED) ## what the pipeline runs
install-tests: $(INSTALLED_TESTS) ## tests, notebooks, S3 on top

# Modules are compiled when they are first imported: most never are.
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Latent Loom needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps -e .
	@touch $@

$(INSTALLED_TESTS): $(INSTALLED) requirements-test.lock
	$(PIP) -r requirements.lock -r requirements-test.lock
	@touch $@

$(INSTALLED_PAGE): $(INSTALLED) requirements-test.lock
	$(PIP) -r requirements.lock -c requirements-test.lock gradio
	@touch $@

clean: ## remove the environment and saved work; data, models, experiments and records of runs stay
	rm -rf $(VENV)
	if [ -d .state ]; then find .state -mindepth 1 -maxdepth 1 ! -name tracking ! -name runs -exec rm -rf {} +; fi
