# One virtual environment in the checkout, with the versions of constraints.txt. `make help` lists the targets.
# Never `pip install torch` without the constraints: they pin the version that is tested.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

MODEL ?= hub_cards/argenseg-tiny
IMAGE ?= examples/sheep.jpg
PROMPT ?= the sheep
OUTPUT ?= outputs
BANK ?= bank
SKIP ?=
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo lora bank train-tiny test lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.installed ## set up and segment the example photograph (IMAGE=, PROMPT=, MODEL=, OUTPUT= change it)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/segment.py $(IMAGE) "$(PROMPT)" --model $(MODEL) --output $(OUTPUT)
	@echo
	@echo "Look at $(OUTPUT)/overlay.png (the mask on the photograph) and $(OUTPUT)/scales.png (how it was drawn)."

lora: $(VENV)/.installed ## fine-tune MODEL on 64 drawn pictures with masks, about 10 minutes
	HF_HUB_OFFLINE=1 $(BIN)/python examples/lora_new_domain/run.py --model $(MODEL) --output $(OUTPUT)/land
	@echo
	@echo "Look at $(OUTPUT)/land/before_after.png and $(OUTPUT)/land/learning_curve.png."

bank: $(VENV)/.installed-$(if $(filter furniture,$(SKIP)),train,bank) ## download packages and build the bank of cut-outs for scenes (BANK=, SKIP="furniture ...")
	$(BIN)/python -m trl_recipes.scenes.build_bank --output $(BANK) $(addprefix --skip ,$(SKIP))
	$(BIN)/python -m trl_recipes.scenes --bank $(BANK) --output $(BANK)/sheet.png
	@echo
	@echo "Look at $(BANK)/sheet.png; who made the pictures is in $(BANK)/ATTRIBUTION.md."

train-tiny: $(VENV)/.installed-train ## train a small model from BANK to OUTPUT/tiny/published (TOKENIZER_STEPS=, MODEL_STEPS= ...)
	BANK=$(BANK) OUT=$(OUTPUT)/tiny PYTHON=$(BIN)/python bash examples/train_tiny.sh

test: $(VENV)/.installed-test ## set up and run ruff, mypy and pytest, in JOBS processes of one thread each
	$(MAKE) --no-print-directory lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope

lint: $(VENV)/.installed-test ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing argenseg and what it needs into $(VENV) (minutes, once) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-train: $(VENV)/.installed
	@echo "installing what the recipes need into $(VENV) ..."
	$(INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/.installed-bank: $(VENV)/.installed-train
	@echo "installing vtk into $(VENV), which draws the 3-D models (SKIP=furniture does without) ..."
	$(INSTALL) --editable '.[bank]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV) ..."
	$(INSTALL) --editable '.[test,train]'
	@touch $@
