# Every target works from a bare machine: python3 (3.10 or newer), make and a C++ compiler.
#   make demo | test | sanitize | bench | recipes-reduced | lint | clean
# and, with a GPU, on a python3 that has torch and the build tools, without a network:
#   make gpu-check

PYTHON ?= python3
VENV ?= .venv
# Development and tests run on this release; the binary itself serves every torch from 2.11 on.
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

.PHONY: demo test sanitize bench recipes-reduced gpu-check lint format build clean

demo: build
	$(PY) -m fastprune demo

test: build
	$(PY) -m pytest

# Tests on a build that AddressSanitizer watches, the emulated CUDA kernels included: reads and
# writes outside of memory end it. Everything with SANITIZE_TESTS=tests, three times as long as test.
SANITIZE_VENV ?= .venv-sanitize
SANITIZE_TESTS ?= tests/test_mon_direct.py tests/test_mon_forms.py tests/test_mon_fourier.py \
  tests/test_mon_invert.py tests/test_mon_splitting.py tests/test_cuda_mon_fourier.py
SANITIZE_PY := $(SANITIZE_VENV)/bin/python
site_of = $$($(1) -c 'import site; print(site.getsitepackages()[0])')
sanitize: $(VENV)/.ready
	test -x $(SANITIZE_PY) || $(PYTHON) -m venv $(SANITIZE_VENV)
	echo "$(call site_of,$(PY))" > "$(call site_of,$(SANITIZE_PY))/tools.pth"
	$(SANITIZE_PY) -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps . \
	  -C build-dir=build/sanitize -C install.strip=false -C cmake.define.FASTPRUNE_CUDA=OFF \
	  -C cmake.define.FASTPRUNE_EMULATION=ON -C cmake.define.FASTPRUNE_SANITIZE=address
	ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 OMP_NUM_THREADS=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  $(SANITIZE_PY) -m pytest -p no:faulthandler $(SANITIZE_TESTS)

bench: build
	$(PY) -m bench

# The papers' recipes on digits, every method once; a few minutes. All results from new trainings.
RECIPES_OUT ?= out/recipes-reduced
recipes-reduced: build
	rm -rf $(RECIPES_OUT)
	OMP_NUM_THREADS=1 $(PY) -m bench.recipes run dpf-table-1 dpf-table-2 dpf-table-6 sap-retrained \
	  --reduced --seeds 1 --only case=resnet-20,fashion-mnist-mlp sparsity=0.4,0.9 \
	  --parallel 2 --out $(RECIPES_OUT)

# Nine minutes in all, in a folder of its own: see python -m fastprune gpu-check --help.
GPU_OUT ?= out/gpu-check
gpu-check:
	$(PYTHON) python/fastprune/cli/gpu_check_build.py --out $(GPU_OUT)
	PYTHONPATH=$(abspath $(GPU_OUT))/site$${PYTHONPATH:+:$$PYTHONPATH} \
	  $(PYTHON) -m fastprune gpu-check --out $(GPU_OUT)

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(VENV)/bin/clang-format -i

build: $(VENV)/.built

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastprune needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install "$(TORCH)"
	$(PIP) install --group run --group build --group test --group lint
	@touch $@

# Editable, in a build folder that is kept: after a change to one kernel this takes seconds. With
# the emulation of CUDA, which the tests use.
$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps --editable . -C cmake.define.FASTPRUNE_EMULATION=ON
	@touch $@

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(VENV) $(SANITIZE_VENV)
