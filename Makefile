# The commands that README.md begins with. Each prepares .venv first if it is missing.
PYTHON ?= python3
CORPUS ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
# The CPU build of torch: from the configured package index if it has one, else from PyTorch's own.
TORCH := torch==$(shell sed -n 's/^torch==//p' $(LOCK))
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: install quickstart quickstart-chat test test-slow test-full test-faults serve-test lint docs format clean

install: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported: use 3.11, 3.12 or 3.13, for example make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)+cpu" --index-url $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: install
	@$(BIN)/moonlight quickstart $(if $(CORPUS),--corpus "$(CORPUS)")

# Instruction tuning of the quickstart's model on simple tasks, with exact match before and after.
quickstart-chat: quickstart
	@$(BIN)/moonlight quickstart-chat

# Every subject: one case of each mechanism.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not full and not faults"

# Further layouts, dtypes and sizes, and the longest interruptions. CI runs it after `make test`.
test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not full and not faults"

test-full: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not faults"

# Runs killed, checkpoints damaged, links cut. The hosts of tests/pretrain/test_two_hosts.py are network namespaces: Linux, root.
test-faults: install
	$(BIN)/python -m pytest -m faults

# One exported checkpoint through transformers, vLLM and SGLang on CPU; a virtual environment for each server.
serve-test: install .venvs/vllm/.installed .venvs/sglang/.installed
	$(BIN)/python tests/serving/serve.py

.venvs/%/.installed: requirements/serve-%.txt
	$(PYTHON) -m venv --clear .venvs/$*
	.venvs/$*/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $<)+cpu" 2>/dev/null \
		|| .venvs/$*/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $<)+cpu" --index-url $(TORCH_INDEX)
	.venvs/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(MAKE) --no-print-directory docs

# The documentation as a site in site/; a dead link inside it is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venvs site runs/quickstart runs/quickstart-* runs/serve-test
