# Two commands do everything: `make repro` and `make test`. Each makes the environment first.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Usage statistics of the tools are off unless you turn them on.
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= 1

# Files of tests side by side, each process with one thread, and one process more than cores: tests of servers and kills
# wait a third of their time.
CORES := $(shell getconf _NPROCESSORS_ONLN)
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n $(shell echo $$(( $(CORES) < 4 ? $(CORES) + 1 : 4 ))) --dist loadfile --no-loadscope-reorder

.PHONY: repro test test-fast ui bench lint install clean

repro: install ## run every stage that is not up to date
	@latentloom check
	@dvc repro
	@latentloom summary

test: install ## every test: fast, pipeline and fault tests
	$(PYTEST)

test-fast: install ## unit tests alone, without the slow ones
	$(PYTEST) -m "not pipeline and not fault and not slow"

ui: install ## MLflow's pages on http://127.0.0.1:5000
	@latentloom ui --port $${PORT:-5000}

bench: install ## how fast the caches are, beside others; half an hour on an idle machine
	@for script in benchmarks/*.py; do echo "== $$script"; PYTHONPATH=src TQDM_DISABLE=1 python $$script || exit 1; done

lint: install
	ruff check .
	ruff format --check .

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Latent Loom needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

clean: ## remove the environment and saved work; data, models, experiments and what MLflow has yet to get stay
	rm -rf $(VENV)
	if [ -d .state ]; then find .state -mindepth 1 -maxdepth 1 ! -name tracking -exec rm -rf {} +; fi
