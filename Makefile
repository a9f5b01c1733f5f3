# Each of the first two makes its own virtual environment on first use.
#   make train   sets up, and learns a prompt on the embedded default
#   make test    sets up, and runs the tests (two processes of one thread: their models are tiny, and threads would wait)
PYTHON ?= python3
# Which versions: constraints.txt, the newest that have been seen; constraints-oldest.txt, the oldest that are supported.
CONSTRAINTS ?= constraints.txt
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: train test test-slow lint format package docs

train: .venv/ready
	.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no examples/train.py

test: .venv-test/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest --numprocesses 2 --dist loadfile

test-slow: .venv-test/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -m slow

# Builds wheel and sdist, and uses the wheel in a clean environment, on the packages of .venv-test; CI installs them anew.
package: .venv-test/ready
	DEPENDENCIES=.venv-test .ci/package

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# The site, into site/; a warning is an error. `make test` builds it, too.
docs: .venv-test/ready
	NO_MKDOCS_2_WARNING=1 .venv-test/bin/mkdocs build --strict

format: .venv-test/ready
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

.venv/ready: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) torch
	.venv/bin/python $(PIP_INSTALL) --editable .
	touch $@

.venv-test/ready: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP_INSTALL) torch
	.venv-test/bin/python $(PIP_INSTALL) --editable ".[test]"
	touch $@
