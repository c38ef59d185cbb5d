# make demo   set up everything, then watch a generator get better
# make test   set up everything, then lint and run the whole suite
# Both work from a clean clone, and offline after the first time.

PYTHON ?= python3
TORCH  ?= 2.13.0# the one place that pins torch

JOBS   ?= $(shell nproc 2>/dev/null || echo 2)# processes of `make test`: a file's tests stay together

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready-$(TORCH)

NATIVE := $(wildcard csrc/* tests/building/*.cpp $(addprefix tests/cuda_on_host/*., h cpp cu))

.PHONY: demo test torture sanitize lint format build figures benchmarks levers gpu-check clean

demo: build
	$(BIN)/flowgrpo-fast train

# The CUDA code for every architecture, where nvcc is found; the other targets compile it for the GPU that is here.
test: export FLOWGRPO_FAST_ARCHS ?= all
test: build lint
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# runs killed wherever they touch their folder, damaged folders, bad rewards, fuzzed ops (minutes)
torture: build
	$(BIN)/pytest -n $(JOBS) -m torture

# the CPU code under the sanitizers (a few minutes); that of the GPU, on the host, is part of the tests
sanitize: build
	$(BIN)/python tests/sanitize/sanitize_cpu.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# ninja decides what is out of date; with nothing to do this takes a fraction of a second
build: $(READY)
	@$(BIN)/python setup.py --quiet build_ext --inplace

# the pictures of README and docs, from a run of the default job
figures: build
	rm -rf runs/figures
	$(BIN)/flowgrpo-fast train --out runs/figures
	$(BIN)/flowgrpo-fast report runs/figures --figures docs/images

# measures every level on this machine (idle, please: about twenty minutes), then writes benchmarks/results/README.md
benchmarks: build
	$(BIN)/python benchmarks/measure.py
	$(BIN)/python benchmarks/report.py

# the training step lever by lever alone: the largest size that this machine does in thirteen minutes
levers: build
	$(BIN)/python benchmarks/measure.py levers
	$(BIN)/python benchmarks/report.py

# on a machine with a GPU, torch and nvcc, without a network: builds, tests and measures with its own Python;
# what that lacks is taken from ./wheels. Results go to benchmarks/results, or to OUT=folder. Four parts of seven
# minutes: PART=first, checks, tables or levers is that one alone.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(PART) $(if $(OUT),--output $(OUT))

$(READY): pyproject.toml install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$($(PYTHON) --version) is too old; set PYTHON to Python 3.10 or later" >&2; exit 2; }
	@$(PYTHON) install.py --venv $(VENV) --torch $(TORCH)
	@touch $@

clean:
	rm -rf build $(VENV) flowgrpo_fast/*.so
