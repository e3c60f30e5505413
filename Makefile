# `make` alone lists what there is.  Everything runs in .venv, which the first target that needs it creates.
#
#   PYTHON=python3.12          the interpreter to build .venv with (3.11 to 3.14; otherwise the first one found)
#   TORCH_INDEX=ADDRESS        a package index to take torch from, such as one of CPU builds
#   PYTEST_FLAGS="-k basis"    handed to pytest
#   BENCH_FLAGS=--quick        handed to bench/train.py or bench/merge.py
#   TORTURE_FLAGS=--quick      handed to bench/torture

.DEFAULT_GOAL := help
.PHONY: help demo gpu gpu-dry bench-train bench-merge bench-methods bench-words bench-merge-methods bench-families bench-regions torture test test-host check format install clean
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/lock.txt
STAMP := $(VENV)/lock.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check
# --no-compile: Python compiles what it imports, when it first imports it; that is a fraction of what is installed.
PIP_INSTALL := $(PIP) install --no-compile
# On a terminal pip shows its progress; in a log only what goes wrong.
QUIET := $(if $(shell [ -t 2 ] && echo terminal),,--quiet --quiet)
PYTEST := $(BIN)/python -m pytest
# A process for each core, up to four, of one thread each; a file's tests stay together, for they share what is slow.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(PYTEST) -n auto --maxprocesses=4 --dist loadfile
# pytest in ComfyUI's own interpreter, with what it lacks in build/host-pytest; some tests: PYTEST_FLAGS=tests/host/FILE.py
IN_HOST := $(BIN)/python tests/host/run.py
# ComfyUI's own types where there is a ComfyUI.  The pack is checked as the package that ComfyUI imports it as, in
# build/pack, for nodes and host import the engine from above themselves.
COMFYUI_PATH ?= $(wildcard $(HOME)/comfy/ComfyUI)
TYPES_OF_HOST = $(if $(COMFYUI_PATH),--extra-search-path $(COMFYUI_PATH))
FAST_TESTS = $(wildcard tests/engine tests/files tests/nodes)

# Nothing is downloaded when it runs, and compiled modules are kept.
export HF_HUB_OFFLINE := 1
export MPLBACKEND := Agg
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make demo       train three concepts, sum them, draw them together: see demo_output/"
	@echo "make test       all tests"
	@echo "make test-host  only those in the real ComfyUI (in COMFYUI_PATH, else ~/comfy/ComfyUI)"
	@echo "make bench-train  measure training beside ComfyUI's own trainer and peft (about an hour)"
	@echo "make bench-methods  train every method on toy concepts and judge them (half an hour on two cores)"
	@echo "make bench-words  fifteen toy concepts in one model, by how they were trained (an hour and a half on two cores)"
	@echo "make bench-merge  measure merging beside ComfyUI's LoRA loaders and peft"
	@echo "make bench-regions  measure regional sampling beside ComfyUI's masks and LoRA hooks (half an hour, 12 GB)"
	@echo "make bench-merge-methods  merge toy concepts by every method and judge them (three quarters of an hour on two cores)"
	@echo "make gpu        prove and measure on a machine with an NVIDIA GPU what at most eight minutes hold (installs nothing)"
	@echo "make gpu-dry    the same in small on the CPU (two minutes)"
	@echo "make torture    try the twelve promises in full and write docs/trust.md (an hour on two cores; TORTURE_FLAGS=--quick)"
	@echo "make check      format, lint, imports, types and the quick tests"
	@echo "make format     put the code into the format that check asks for"
	@echo "make install    only create $(VENV) with the pinned packages"
	@echo "make clean      remove $(VENV), demo_output and caches"

demo: $(STAMP)
	$(BIN)/python -m modular_concepts demo

# The tests without a host, then those in the host, by its own interpreter; all run, whatever fails.
test: $(STAMP)
	@status=0; \
	$(SIDE_BY_SIDE) $(FAST_TESTS) $(PYTEST_FLAGS) || { code=$$?; [ $$code -eq 5 ] || status=$$code; }; \
	$(IN_HOST) $(PYTEST_FLAGS) || { code=$$?; [ $$code -eq 5 ] || status=$$code; }; \
	exit $$status

test-host: $(STAMP)
	$(IN_HOST) $(PYTEST_FLAGS)

bench-train: $(STAMP)
	@$(BIN)/python bench/train.py $(BENCH_FLAGS)

bench-words: $(STAMP)
	@$(BIN)/python -m bench.words $(BENCH_FLAGS)

bench-methods: $(STAMP)
	@$(BIN)/python -m bench.methods $(BENCH_FLAGS)

bench-merge-methods: $(STAMP)
	@$(BIN)/python -m bench.merge_methods $(BENCH_FLAGS)

bench-families: bench-merge-methods  # as it was called before

bench-merge: $(STAMP)
	@$(BIN)/python bench/merge.py $(BENCH_FLAGS)

bench-regions: $(STAMP)
	@$(BIN)/python bench/regions.py $(BENCH_FLAGS)

# The machine's own Python, for it has torch with CUDA: nothing is installed.
gpu:
	@$(or $(PYTHON),python3) bench/gpu.py $(BENCH_FLAGS)

gpu-dry: $(STAMP)
	@$(BIN)/python bench/gpu.py --dry $(BENCH_FLAGS)

torture: $(STAMP)
	@$(BIN)/python -m bench.torture $(TORTURE_FLAGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	@mkdir -p build && ln -sfn .. build/pack
	$(BIN)/ty check --python $(VENV) $(TYPES_OF_HOST) -c 'environment.root=["./build"]' $(addprefix build/pack/,modular_concepts host nodes)
	$(SIDE_BY_SIDE) $(FAST_TESTS) -m "not slow" $(PYTEST_FLAGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

clean:
	rm -rf $(VENV) demo_output build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3); do \
	  "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "Creating $(VENV) with $$python"; \
	  exec "$$python" -m venv $(VENV); \
	done; \
	echo "Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: the package python3-venv)." >&2; \
	exit 1

# The pins are complete, so pip need not resolve them, which halves the time; the last step checks that all fit,
# and adds what this platform's torch asks for beyond them (CUDA packages, if any).
$(STAMP): $(LOCK) | $(BIN)/python
	@echo "Installing pinned packages into $(VENV) (1 to 2 minutes, about 1 GB; once)"
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null  # after an interrupted start
ifneq ($(strip $(TORCH_INDEX)),)
	@$(PIP_INSTALL) $(QUIET) --no-deps --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' $(LOCK))"
endif
	@$(PIP_INSTALL) $(QUIET) --no-deps -r $(LOCK)
	@if $(BIN)/python -c "$$ASKS_FOR_CUDA"; then \
	  command -v nvidia-smi >/dev/null || echo "Hint: this torch brings several GB of CUDA packages, and there seems" \
	    "to be no NVIDIA GPU here. For a CPU build: make clean, then make ... TORCH_INDEX=(address of CPU builds)"; \
	  $(PIP_INSTALL) $(QUIET) -r $(LOCK); \
	else \
	  $(PIP_INSTALL) --quiet --quiet -r $(LOCK); \
	fi
	@cp $(LOCK) $@

define ASKS_FOR_CUDA
import sys
from importlib.metadata import requires
sys.exit(not (sys.platform == 'linux' and any('nvidia' in line for line in requires('torch'))))
endef
export ASKS_FOR_CUDA
