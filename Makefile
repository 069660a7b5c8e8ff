# Two commands for newcomers: `make demo` and `make test`. Both set up what they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := outputs/demo.mp4
PROMPT :=# of the demo: make demo PROMPT="..."; the command line's own if empty

.PHONY: demo test dry fuzz kills slow gpu-check notebook lint format wheel-test clean

demo: export SENTENCE = $(PROMPT)
demo: $(VENV)/.runtime  ## a video with sound from the embedded checkpoint
	$(BIN)/cosmos3-jax generate --checkpoint tiny --sound --out $(DEMO) --overwrite \
		$(if $(strip $(PROMPT)),--prompt "$$SENTENCE")

PYTEST := $(BIN)/python -m pytest -q --numprocesses 2 --no-loadscope-reorder

test: $(VENV)/.dev  ## every test that needs no GPU
	$(PYTEST) --dist loadfile -m "not gpu and not dry"

dry: $(VENV)/.dev  ## examples, notebook, benchmarks and GPU tests run through, at tiny sizes on a CPU
	$(PYTEST) --dist worksteal -m dry

FUZZ := cd tests && $(CURDIR)/$(BIN)/python -m

fuzz: $(VENV)/.dev  ## 20,000 bad inputs to all readers; the table of docs/reliability.md
	$(FUZZ) fuzz --inputs 20000 --write

kills: $(VENV)/.dev  ## 300 kills of commands and 200 pairs of them; the other table there
	$(FUZZ) fuzz.kills --write

slow: fuzz kills  ## what the tests try in small, at length

gpu-check:  ## the tests that need one CUDA GPU, two or four, whichever are there; says what was not run
	-@git log -1 --format='commit %h'
	@$(PYTHON) -c "from cosmos3_jax.runtime.measure import environment; print(environment())"
	$(PYTHON) -m pytest -q -m gpu --numprocesses 6 --dist worksteal --durations 10 -rs --no-fold-skipped --need-gpu \
		tests/test_gpu*.py

notebook: $(VENV)/.dev  ## execute notebooks/parity.ipynb from the top, in place
	$(BIN)/python scripts/run_notebook.py notebooks/parity.ipynb

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-test: $(VENV)/.dev  ## the wheel alone, in an empty environment away from the repository
	$(BIN)/python scripts/wheel_test.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist outputs *.egg-info
