# make train            train a small MoE language model, FP8 beside its BF16 twin
# make test             run the tests
# make lint             ruff and mypy
# make doctor           what this machine can do, and why not
# make clean            remove the virtual environment and all caches
#
# From a fresh clone each of them first creates .venv and installs what it needs. To use a Python
# that already has torch (a GPU machine, say) as it is, with nothing installed:
#
#   make train PYTHON=python3 VENV=
#
# ARGS is handed to the job:          make train ARGS="--preset h100 --name first"
#                                     make test ARGS="tests/kernels -k gemm"
# PIP_FLAGS is handed to pip, e.g. to take the smaller CPU build of torch where there is no GPU:
#                                     make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
TEST_JOBS ?= 2

ifeq ($(strip $(VENV)),)
RUN = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
READY =
else
RUN = $(VENV)/bin/python
READY = $(VENV)/.installed
endif

# Two workers where pytest-xdist is there (a machine with its own Python may not have it).
PARALLEL = $(shell $(RUN) -c "import xdist" 2>/dev/null && echo "-n $(TEST_JOBS) --dist worksteal")

.PHONY: train test lint format doctor install clean

train: $(READY)
	$(RUN) -m recipes.pretrain $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PARALLEL) $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

doctor: $(READY)
	$(RUN) -m fp8moe.cli doctor

install: $(READY)

ifneq ($(strip $(VENV)),)
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,train]'
	touch $@
endif

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fp8moe recipes benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
