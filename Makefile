# Each target installs what it needs into a virtual environment, .venv.
# `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin

# All tests of a file run in one process, because they share fixtures and compiled code.
PYTEST := python -m pytest --numprocesses auto --dist loadfile

# Python compiles the modules that it imports, a small part of those installed.
PIP_INSTALL := pip install --quiet --disable-pip-version-check --no-compile

# Training on a CPU allocates a lot of memory in each step, which is cheaper in pages of
# 2 MB. Systems without glibc ignore this.
TRAIN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python

# Where the demo's runs are, and the end of their names.
PRETRAINED := outputs/llama/comparison
DEMO := learning_rate=0.002-seed0

ABOUT_B1 := "Both sides have b1 0.9. AdamW gains from a lower b1: docs/results.md has both tuned."

.PHONY: help demo sweep mae glue quadratic study results costs costs-gpu peers test test-library \
  test-floor test-tpu test-parity lint docs screenshots dist clean

help:  ## list the targets
	@awk -F ':.*##  *' '/^[a-z-]+:.*##/ { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.examples  ## train a small Llama with AdamW and with cautious AdamW (5 minutes)
	$(TRAIN) -m examples.llama compare
	@echo $(ABOUT_B1)

sweep: $(VENV)/.examples  ## repeat the demo's comparison at four learning rates (20 minutes)
	$(TRAIN) -m examples.llama compare --sweep learning_rate=1e-3,2e-3,4e-3,8e-3 \
	  --output-dir outputs/llama/sweep

mae: $(VENV)/.examples  ## train a small masked autoencoder with AdamW and with cautious AdamW (5 minutes)
	$(TRAIN) -m examples.mae compare
	@echo $(ABOUT_B1)

# The demo's two models, each fine-tuned with and without caution.
glue: $(VENV)/.examples  ## fine-tune the demo's models on two tasks, with five seeds (10 minutes)
	$(TRAIN) -m examples.llama compare
	for task in package docstring; do \
	  $(TRAIN) -m examples.glue compare --preset $$task --seeds 0 1 2 3 4 \
	    --sweep from=$(PRETRAINED)/adamw-$(DEMO),$(PRETRAINED)/cautious-adamw-$(DEMO) \
	    --output-dir outputs/glue/$$task || exit; \
	done

quadratic: $(VENV)/.examples  ## run and plot the paper's toy problem
	$(BIN)/python -m examples.quadratic

study: $(VENV)/.examples  ## train the missing runs of the study (hours), and write docs/results.md
	$(TRAIN) -m benchmarks.study run
	@$(MAKE) --no-print-directory results

results: $(VENV)/.examples  ## write docs/results.md and its figures from the files in docs/results
	$(BIN)/python -m benchmarks.study draw

# The TPU compiler has its own environment: where it is installed, JAX looks for a TPU
# whenever it starts.
costs: $(VENV)/.examples  ## report what caution costs on a TPU, by its compiler, and on this CPU
	@$(MAKE) --no-print-directory VENV=.venv-tpu .venv-tpu/.tpu .venv-tpu/.examples
	$(BIN)/python -m benchmarks.cpu
	XLA_FLAGS=--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED \
	  $(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.tracing
	$(TRAIN) -m benchmarks.training_step cpu
	.venv-tpu/bin/python -m benchmarks.tpu
	.venv-tpu/bin/python -m benchmarks.training_step tpu

# It has its own environment too. NVIDIA's libraries, some gigabytes, are not needed.
costs-gpu:  ## count what caution moves on a GPU, with its compiler; needs Python 3.12 or later, no GPU
	@$(MAKE) --no-print-directory VENV=.venv-gpu .venv-gpu/.test
	.venv-gpu/bin/$(PIP_INSTALL) tqdm tyro tabulate 'jax>=0.12'
	.venv-gpu/bin/$(PIP_INSTALL) --no-deps \
	  $$(.venv-gpu/bin/python -c "import jax; v = jax.__version__; \
	    print(f'jax-cuda12-plugin=={v} jax-cuda12-pjrt=={v}')")
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m benchmarks.gpu

peers: $(VENV)/.examples $(VENV)/.peers $(VENV)/.parity  ## compare times with the optimizers of PyTorch and timm, and with transformers' Llama
	$(BIN)/python -m benchmarks.peers
	$(TRAIN) -m benchmarks.llama

test: $(VENV)/.examples $(VENV)/.hf $(VENV)/.test  ## run all tests, including the examples in docstrings and documentation
	$(BIN)/$(PYTEST)

test-library: $(VENV)/.test  ## run only the library's tests
	$(BIN)/$(PYTEST) --ignore tests/examples

# Programs compile faster with little optimization. `make test` uses the usual optimization.
test-floor:  ## run the library's tests on the oldest supported JAX and Optax
	@$(MAKE) --no-print-directory VENV=.venv-floor .venv-floor/bin/pip
	.venv-floor/bin/$(PIP_INSTALL) --editable '.[test]' jax==0.7.0 jaxlib==0.7.0 optax==0.2.8
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv-floor/bin/$(PYTEST) --ignore tests/examples

test-tpu:  ## test the memory traffic of a step with the TPU compiler; needs no TPU
	@$(MAKE) --no-print-directory VENV=.venv-tpu .venv-tpu/.tpu .venv-tpu/.test .venv-tpu/.examples
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest tests/test_tpu.py

test-parity: $(VENV)/.examples $(VENV)/.test $(VENV)/.parity  ## test exported models against transformers and PyTorch
	$(BIN)/python -m pytest tests/examples/test_llama_export.py \
	  tests/examples/test_mae_export.py tests/examples/test_glue_export.py

lint: $(VENV)/.examples $(VENV)/.lint  ## run ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the site in build/docs, which runs the notebook (2 minutes)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

# Requires Chromium: apt install chromium.
screenshots: docs $(VENV)/.screenshots  ## take narrow and wide screenshots of every page of the site
	$(BIN)/python docs/screenshots.py

# The wheel is built from the source distribution, and the docstring examples are run with
# it in an environment that has only its dependencies and pytest.
dist: $(VENV)/.dist  ## build the distribution, check it, and test it in an empty environment
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/dist
	build/dist/bin/$(PIP_INSTALL) dist/*.whl pytest
	cd build/dist && bin/python -m pytest --quiet --doctest-modules --pyargs optax_cautious \
	  -c /dev/null --rootdir .

$(VENV)/.%: pyproject.toml | $(VENV)/bin/pip
	@echo "Installing what '$*' needs into $(VENV) (a minute or two) ..."
	@$(BIN)/$(PIP_INSTALL) --editable '.[$*]'
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)

clean:  ## remove the environments and everything that was built
	rm -rf .venv .venv-floor .venv-gpu .venv-newest .venv-tpu .jax_cache build outputs
