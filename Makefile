# Two commands do everything on a fresh machine, and set up what they need first:
#   make engines R=8,16      compile one engine per degree
#   make test                run the tests (test-full: all of them; test-stress: what waits, 20 times on a busy machine)
#   make serve               serve the compiled family (the example where there is none; ARGS="--objective-ms 50")
#   make experiment          repeat the paper's experiment (resumable; QUICK=1 for a quarter of an hour)
# Your own model:  make engines R=8,16 MODEL=deit_small_patch16_224 CHECKPOINT=my.safetensors
#                  [COMPENSATOR=FILE SOURCE=0 [SCALE=0.1]] [SCHEDULE=strided:3] [REDUCTION=prune] [IMAGES=DIR]
#                  [PRECISION=fp32|fp16|bf16|int8 [CALIBRATION=DIR]] [OUT=DIR] [ARGS=...]
#                  [BACKEND=onnxruntime|openvino|tensorrt|tensorrt-rtx]

PYTHON ?= python3
BIN := .venv/bin
# the engine library: ONNX Runtime for this machine's GPU where there is one
ENGINE ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
# two test processes on two cores: threads that spin while they wait would only fight each other
QUIET_THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
PIP := $(BIN)/python -m pip --disable-pip-version-check

R ?= 8,16
MODEL ?= examples/digits
ifeq ($(MODEL),examples/digits)
COMPENSATOR ?= examples/digits/compensator.safetensors
IMAGES ?= examples/digits/sheets
CALIBRATION ?= examples/digits-calibration
endif
SOURCE ?= 0
SCALE ?=
PRECISION ?= fp32
QUANTIZED = $(filter int8 fp8 int8-weights int4-weights,$(PRECISION))
BACKEND ?= auto
OUT ?= engines/$(notdir $(MODEL))

# wheels of TensorRT's bindings, whose signatures the tests read: their libraries are not installed
TENSORRT_API := 10.16.1.11 11.4.0.106
# wheels that hold a Triton server with its Python backend, which only works with this numpy: served by in tests
TRITON := nvidia-pytriton==0.7.0 numpy==1.26.4

.PHONY: engines serve test test-bench test-full test-stress experiment bench gpu-check lint native setup clean
.DELETE_ON_ERROR:

engines: .venv/ready native
	$(BIN)/tocom compile --model $(MODEL) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) \
	  $(if $(COMPENSATOR),--compensator $(COMPENSATOR)) $(if $(SCALE),--scale $(SCALE)) \
	  $(if $(SCHEDULE),--schedule $(SCHEDULE)) $(if $(REDUCTION),--reduction $(REDUCTION)) \
	  --source-degree $(SOURCE) --degrees $(R) $(if $(IMAGES),--images $(IMAGES)) \
	  $(if $(QUANTIZED),$(if $(CALIBRATION),--calibration $(CALIBRATION))) --precision $(PRECISION) --backend $(BACKEND) --out $(OUT) $(ARGS)

# TensorRT for RTX is installed only where it is asked for
ifneq ($(filter tensorrt-rtx,$(BACKEND)),)
engines: .venv/ready-rtx
endif

serve: .venv/ready-serve
	test -f $(OUT)/family.json || $(MAKE) engines ARGS=
	$(BIN)/tocom serve $(OUT) $(ARGS)

test: .venv/ready-dev build/tensorrt-api/ready build/triton/ready native
	$(QUIET_THREADS) $(BIN)/python -m pytest -n 2

# the campaigns of bench/, of which `make test` runs a thin slice
test-bench: .venv/ready-dev native
	$(QUIET_THREADS) $(BIN)/python -m pytest -n 2 -m "" tests/bench

test-full: .venv/ready-dev build/tensorrt-api/ready build/triton/ready native
	$(QUIET_THREADS) $(BIN)/python -m pytest -n 2 -m "" --hypothesis-profile others

# what waits for threads, processes and sockets, N times beside two processes that never rest, in another order each time
N ?= 20
test-stress: .venv/ready-dev build/tensorrt-api/ready build/triton/ready native
	@for number in 1 2; do $(BIN)/python -c 'while True: pass' & busy="$$busy $$!"; done; trap "kill $$busy" EXIT; \
	trap 'exit 130' INT TERM; \
	for round in $$(seq $(N)); do \
	  seed=$$(date +%s); echo "round $$round of $(N), --random-order-seed=$$seed"; \
	  $(QUIET_THREADS) $(BIN)/python -m pytest -n 2 -m "timing and not full" --random-order-seed=$$seed || exit 1; \
	done

experiment: .venv/ready-dev
	$(BIN)/python -m bench.experiment --preset $(if $(QUICK),quick,$(or $(PRESET),small)) $(ARGS)

bench: .venv/ready-dev native
	$(BIN)/python -m bench.cpu $(ARGS)

gpu-check: .venv/ready-dev native
	$(BIN)/python -m bench.gpu $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

native: .venv/ready
	@$(BIN)/python -m tocom.runtime.native

setup: .venv/ready-dev native

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(ENGINE),compile,openvino,report]'
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(ENGINE),dev]'
	touch $@

.venv/ready-serve: .venv/ready
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(ENGINE),compile,openvino,report,serve]'
	touch $@

.venv/ready-rtx: .venv/ready
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(ENGINE),compile,openvino,report,tensorrt-rtx]'
	touch $@

build/tensorrt-api/ready: Makefile .venv/ready
	rm -rf build/tensorrt-api
	for version in $(TENSORRT_API); do \
	  $(PIP) install --quiet --no-deps --target build/tensorrt-api/$$version tensorrt-cu13-bindings==$$version || exit 1; \
	done
	touch $@

build/triton/ready: Makefile .venv/ready
	rm -rf build/triton
	$(PIP) install --quiet --no-deps --only-binary :all: --target build/triton $(TRITON) && touch $@ \
	  || echo "no Triton server to be had for this platform: its tests are skipped"

clean:
	rm -rf .venv build engines runtime/native/built *.egg-info
