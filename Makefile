.PHONY: demo test quality style clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# A fresh machine needs nothing but Python 3.11: every target installs the pinned set first.
$(STAMP): constraints.txt setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(STAMP)  ## reward model, SPO and evaluation in the shapes world; writes demo_output/
	$(BIN)/python examples/shapes/demo.py --output_dir demo_output

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest tests

quality: $(STAMP)  ## what CI asks of the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo_output build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path "./.venv/*" -exec rm -rf {} +
