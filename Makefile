# `make check` before every commit: seconds, with the tests of the lowest layers; `make test` runs every test that needs nothing but Python. All of it runs in .venv, which run_local.sh keeps.
PY := .venv/bin/python

.PHONY: check format test clean setup

check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	./run_local.sh test -q tests/test_layout.py tests/test_checks.py tests/schemas tests/records

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

test:
	./run_local.sh test

setup:
	@./run_local.sh setup

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
