# Each target sets itself up: a virtual environment in .venv, with what it needs.
#
#   make demo    train the same small Llama with AdamW and with cautious AdamW
#   make mae     the same with a small masked autoencoder, on glyphs
#   make glue    fine-tune the demo's models on two tasks, each with both, five seeds
#   make test    run the tests, the docstrings' and the README's examples among them
#   make lint    ruff and mypy
#   make costs   what caution costs, by the TPU's compiler and on this machine's CPU
#   make peers   times beside PyTorch's and timm's optimizers and transformers' Llama
#   make study   train what the study still lacks (hours), and draw docs/results.md
#   make results draw docs/results.md from the files in docs/results
#   make sweep   the demo's comparison at four learning rates (a quarter of an hour)

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin

# One process takes the tests of a file, which share what they set up and compile.
PYTEST := python -m pytest --numprocesses auto --dist loadfile

# Training on a CPU takes much fresh memory at each step, and glibc can take it in pages
# of 2 MB. Other systems ignore this.
TRAIN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python

# The runs of the demo.
PRETRAINED := outputs/llama/comparison
DEMO := learning_rate=0.002-seed0

.PHONY: demo sweep mae glue quadratic study results costs peers test test-library test-floor test-tpu test-parity \
  lint clean

demo: $(VENV)/.examples
	$(TRAIN) -m examples.llama compare

sweep: $(VENV)/.examples
	$(TRAIN) -m examples.llama compare --sweep learning_rate=1e-3,2e-3,4e-3,8e-3 \
	  --output-dir outputs/llama/sweep

mae: $(VENV)/.examples
	$(TRAIN) -m examples.mae compare

# The demo's two models, each fine-tuned with and without caution.
glue: $(VENV)/.examples
	$(TRAIN) -m examples.llama compare
	for task in package docstring; do \
	  $(TRAIN) -m examples.glue compare --preset $$task --seeds 0 1 2 3 4 \
	    --sweep from=$(PRETRAINED)/adamw-$(DEMO),$(PRETRAINED)/cautious-adamw-$(DEMO) \
	    --output-dir outputs/glue/$$task || exit; \
	done

quadratic: $(VENV)/.examples
	$(BIN)/python -m examples.quadratic

study: $(VENV)/.examples
	$(TRAIN) -m benchmarks.study run
	@$(MAKE) --no-print-directory results

results: $(VENV)/.examples
	$(BIN)/python -m benchmarks.study draw

# The TPU's compiler has an environment of its own: where it is installed, JAX looks for
# a TPU whenever it starts.
costs: $(VENV)/.examples
	@$(MAKE) --no-print-directory VENV=.venv-tpu .venv-tpu/.tpu .venv-tpu/.examples
	$(BIN)/python -m benchmarks.cpu
	XLA_FLAGS=--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED \
	  $(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.tracing
	$(TRAIN) -m benchmarks.training_step cpu
	.venv-tpu/bin/python -m benchmarks.tpu
	.venv-tpu/bin/python -m benchmarks.training_step tpu

peers: $(VENV)/.examples $(VENV)/.peers $(VENV)/.parity
	$(BIN)/python -m benchmarks.peers
	$(TRAIN) -m benchmarks.llama

test: $(VENV)/.examples $(VENV)/.hf $(VENV)/.test
	$(BIN)/$(PYTEST)

# Without the examples and what they install.
test-library: $(VENV)/.test
	$(BIN)/$(PYTEST) --ignore tests/examples

# The library on the oldest JAX and Optax that it declares.
test-floor:
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --disable-pip-version-check \
	  --editable '.[test]' jax==0.7.0 jaxlib==0.7.0 optax==0.2.8
	.venv-floor/bin/$(PYTEST) --ignore tests/examples

test-tpu:
	@$(MAKE) --no-print-directory VENV=.venv-tpu .venv-tpu/.tpu .venv-tpu/.test .venv-tpu/.examples
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest tests/test_tpu.py

# What the examples export, in transformers and PyTorch.
test-parity: $(VENV)/.examples $(VENV)/.test $(VENV)/.parity
	$(BIN)/python -m pytest tests/examples/test_llama_export.py \
	  tests/examples/test_mae_export.py tests/examples/test_glue_export.py

lint: $(VENV)/.examples $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/.%: pyproject.toml | $(VENV)/bin/pip
	@echo "Installing what '$*' needs into $(VENV) (a minute or two) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf .venv .venv-floor .venv-newest .venv-tpu .jax_cache build outputs
