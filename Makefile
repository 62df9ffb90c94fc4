# Two commands do everything on a fresh Linux machine that has python (3.11 to 3.13), g++ and make:
#
#   make demo    installs the package in .venv and runs the main job
#   make test    installs it with the development tools and runs every check, as CI does
#
# PYTHON=python3.12      the interpreter to make .venv with
# TORCH='torch==2.11.0'  the torch to install there. Without it: the torch that PYTHON already has (2.11 or newer,
#                        a CUDA build on a machine with a GPU), else the one in requirements/torch.txt
# ARGS='--seconds 10'    arguments for `tem demo` or tools/check.py
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=

BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.[ch]pp' -o -name '*.h')

.PHONY: demo test venv build clean

demo: $(VENV)/package.stamp
	$(BIN)/tem demo $(ARGS)

test: venv
	$(BIN)/python tools/check.py $(ARGS)

venv: $(VENV)/package.stamp $(VENV)/dev.stamp

# Recompiles what changed, in place; `make venv` would compile everything.
build: venv
	$(BIN)/python setup.py build_ext --inplace

clean:
	rm -rf build dist $(VENV) *.egg-info torch_elastic_mem/*.so

$(VENV)/torch.stamp: requirements/torch.txt tools/environment.py
	$(PYTHON) tools/environment.py create $(VENV) --torch '$(TORCH)'
	touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/torch.stamp
	$(BIN)/python tools/environment.py extra dev gpu
	touch $@

# Without build isolation, so that torch can be seen and torch_elastic_mem._torch is built for it.
$(VENV)/package.stamp: pyproject.toml setup.py $(NATIVE) $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@
