# Two commands do everything on a fresh machine, and set up what they need first:
#   make engines R=8,16      compile one engine per degree
#   make test                run the tests
#   make experiment          repeat the paper's experiment (resumable; QUICK=1 for a quarter of an hour)
# Your own model:  make engines R=8,16 MODEL=deit_small_patch16_224 CHECKPOINT=my.safetensors
#                  [COMPENSATOR=FILE SOURCE=0 [SCALE=0.1]] [SCHEDULE=strided:3] [REDUCTION=prune] [IMAGES=DIR]
#                  [PRECISION=fp32|bf16] [BACKEND=onnxruntime|openvino] [OUT=DIR] [ARGS=...]

PYTHON ?= python3
BIN := .venv/bin
# two test processes on two cores: threads that spin while they wait would only fight each other
QUIET_THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
PIP := $(BIN)/python -m pip --disable-pip-version-check

R ?= 8,16
MODEL ?= examples/digits
ifeq ($(MODEL),examples/digits)
COMPENSATOR ?= examples/digits/compensator.safetensors
IMAGES ?= examples/digits/sheets
endif
SOURCE ?= 0
SCALE ?=
PRECISION ?= fp32
BACKEND ?= auto
OUT ?= engines/$(notdir $(MODEL))

.PHONY: engines test test-full experiment bench lint native setup clean
.DELETE_ON_ERROR:

engines: .venv/ready native
	$(BIN)/tocom compile --model $(MODEL) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) \
	  $(if $(COMPENSATOR),--compensator $(COMPENSATOR)) $(if $(SCALE),--scale $(SCALE)) \
	  $(if $(SCHEDULE),--schedule $(SCHEDULE)) $(if $(REDUCTION),--reduction $(REDUCTION)) \
	  --source-degree $(SOURCE) --degrees $(R) $(if $(IMAGES),--images $(IMAGES)) \
	  --precision $(PRECISION) --backend $(BACKEND) --out $(OUT) $(ARGS)

test: .venv/ready-dev native
	$(QUIET_THREADS) $(BIN)/python -m pytest -n 2

test-full: .venv/ready-dev native
	$(QUIET_THREADS) $(BIN)/python -m pytest -n 2 -m ""

experiment: .venv/ready-dev
	$(BIN)/python -m bench.experiment --preset $(if $(QUICK),quick,$(or $(PRESET),small)) $(ARGS)

bench: .venv/ready-dev native
	$(BIN)/python -m bench.cpu $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

native: .venv/ready
	@$(BIN)/python -m runtime.native

setup: .venv/ready-dev native

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable '.[openvino]'
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,openvino,tensorrt-rtx]'
	touch $@

clean:
	rm -rf .venv build engines runtime/native/built *.egg-info
