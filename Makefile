# make demo and make test are all the set-up there is: every target makes .venv first when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(shell find csrc -type f) setup.py
SOURCES := $(shell find csrc tests/cuda/host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TORCH := 2.13.0
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: install demo test test-all test-torch mutants fingerprint lint docs format bench bench-train bench-report gpu-check study \
  study-quick study-report study-check clean

install: $(STAMP)

# The editable install compiles camkd_fast._C; any change under csrc/ makes it stale.
$(STAMP): pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/camkd-fast demo --out runs/demo

# Two processes, because a test keeps about one core busy; the tests of a file share what they build.
test: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest

# What depends on torch, with another release of it (several GB): `make test-torch OTHER=2.8.0`. The interpreter of Triton
# before 3.7 needs an older numpy.
OTHER_BIN = build/torch-$(OTHER)/bin
test-torch: $(STAMP)
	test -n '$(OTHER)' || { echo 'give a release: make test-torch OTHER=2.8.0' >&2; exit 2; }
	$(PYTHON) -m venv build/torch-$(OTHER)
	CAMKD_FAST_CUDA=0 $(OTHER_BIN)/python -m pip install -q torch==$(OTHER) 'numpy<2.4' '.[test]'
	$(OTHER_BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile \
	  $(addprefix tests/,losses backends models data train cli experiments integrations)

# Hours: which of the wrong changes in tests/mutants do the tests notice? `python -m tests.mutants --only AREA` for a part,
# `--resume` to keep the results of unchanged files, `--record` to commit them.
mutants: $(STAMP)
	$(BIN)/python -m tests.mutants

# One hash per backend over all its results: equal before and after a refactoring.
fingerprint: $(STAMP)
	$(BIN)/python -m tests.support.fingerprint

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .  # its cache misses a package that moved
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(MKDOCS)

# Open build/site/index.html, or serve the folder for the search.
docs: $(STAMP)
	$(MKDOCS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: $(STAMP)
	$(BIN)/python -m benchmarks logit_loss small_batch feature_loss linear_loss

bench-train: $(STAMP)
	$(BIN)/python -m benchmarks train_step loaders

# The HTML page, plots and the tables of README.md and docs/ from the committed results.
bench-report: $(STAMP)
	$(BIN)/python -m benchmarks.publish

# On a machine with a GPU, against the torch, triton and compilers that are there: no .venv, no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

# Hours; what is finished is kept, so it may be stopped and started again. Then `make study-report`.
study: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/camkd-fast compare --study benchmarks/study/study.yaml --out runs/study \
	  --results benchmarks/study/results.jsonl

study-quick: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/camkd-fast compare --study benchmarks/study/quick.yaml --out runs/study-quick

study-report: $(STAMP)
	$(BIN)/python -m benchmarks.publish_study

# Three finished cells once more, which must end with the same accuracy exactly.
study-check: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/camkd-fast compare --study benchmarks/study/study.yaml --out runs/study \
	  --results benchmarks/study/results.jsonl --check 3

clean:
	rm -rf build dist runs *.egg-info $(VENV) camkd_fast/*.so
