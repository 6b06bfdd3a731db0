# make demo   environment, build, a real model, a chat answer with tokens per second
# make test   set-up and all tests
# make test-native [SEED=1] [CASES=1000]   the CPU kernels on random shapes under AddressSanitizer and UBSan
# make test-native-avx512 [SEED=1] [CASES=300]   the AVX-512 ones too on a processor without it, their intrinsics emulated
# make test-native-arm [SEED=1] [CASES=300]   the same cross-built for AArch64 and run by qemu, under UBSan
# make lint   ruff, mypy, layer check
# make test-gpu [DEVICE=dcu]   on a machine with a card: doctor, the tests that touch a device, and bench/gpu.py
#
# PYTHON=python3.12        which interpreter to build the environment with
# WORKERS=2                how many processes run the tests, file by file
# TORCH="torch --index-url https://download.pytorch.org/whl/cpu"   for the tests: a PyTorch without CUDA packages

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
NATIVE := $(wildcard csrc/cpu/*.cpp csrc/cpu/*.h csrc/cpu/*.txt csrc/gpu/launcher/*.cpp csrc/gpu/launcher/*.h) setup.py pyproject.toml
DEVICE ?= cuda

.PHONY: demo build test test-env test-native test-native-avx512 test-native-arm test-gpu lint bench clean

demo: build
	$(BIN)/qwen-rt chat demo --prompt "Write a Python function that checks whether a string is a palindrome."

build: $(STAMPS)/native

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "python venv failed: on Debian/Ubuntu, apt install python3-venv python3-dev g++"; exit 1; }
	mkdir -p $(STAMPS)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" wheel "pybind11>=2.12"
	touch $@

$(STAMPS)/native: $(STAMPS)/venv $(NATIVE)
	$(BIN)/pip install -q --no-build-isolation -e .
	$(BIN)/python -c 'import qwen_rt._cpu, qwen_rt._gpu' || { echo "the native extensions were not built: is g++ (C++17) with the Python headers there? (Debian/Ubuntu: apt install g++ python3-dev)"; exit 1; }
	touch $@

test-env: $(STAMPS)/test
$(STAMPS)/test: $(STAMPS)/native
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q --no-build-isolation -e '.[test,lint]'
	touch $@

test: test-env
	QWEN_RT_TEST_DOWNLOAD=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Needs g++ only. Without SEED other shapes each time; a failure names its seed.
test-native:
	$(MAKE) -C tests/native -j2 BUILD=$(CURDIR)/build/native
	build/native/check --cases $(or $(CASES),1000) $(if $(SEED),--seed $(SEED))

# On a processor with AVX2: the headers of SIMDe come from PyPI.
test-native-avx512: $(STAMPS)/venv
	$(BIN)/pip install -q --no-deps cmeel-simde==0.8.2
	$(MAKE) -C tests/native -j2 BUILD=$(CURDIR)/build/native-avx512 \
	  SIMDE=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' | xargs realpath)/cmeel.prefix/include
	build/native-avx512/check --cases $(or $(CASES),300) $(if $(SEED),--seed $(SEED))

# On any machine; the instruction set under test is NEON with FEAT_DotProd, which qemu's default processor has.
test-native-arm:
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || \
	  { echo "no $$tool: on Debian/Ubuntu, apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(MAKE) -C tests/native -j2 CXX=aarch64-linux-gnu-g++ BUILD=$(CURDIR)/build/native-aarch64
	qemu-aarch64 build/native-aarch64/check --cases $(or $(CASES),300) $(if $(SEED),--seed $(SEED))

# Starts with `devices`, which says why when the card is not usable; the contract then fails instead of skipping.
test-gpu: test-env
	$(BIN)/qwen-rt devices
	$(BIN)/qwen-rt doctor $(DEVICE)
	QWEN_RT_CONTRACT_BACKEND=$(DEVICE) $(BIN)/python -m pytest tests/contract tests/gpu
	$(BIN)/python bench/gpu.py --backend $(DEVICE)

lint: test-env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_layers.py

bench: build
	$(BIN)/python bench/cpu_vs_llamacpp.py

clean:
	rm -rf $(VENV) build qwen_rt/*.so qwen_rt/_prebuilt *.egg-info
