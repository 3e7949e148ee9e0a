# Everything runs in .venv, made on first use from constraints.txt; PYTHON chooses the interpreter.
PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check

.PHONY: demo quick test slow thorough faults check engines docs screenshot bench wheel clean

demo: .venv/installed
	.venv/bin/svf demo

# What a change breaks first, of every room, and nothing that starts a framework anew or compiles for long.
QUICK = tests/spec tests/files tests/oracle tests/order/test_order.py tests/show/test_show.py \
	tests/judge/test_diff.py tests/recipes/test_elements.py tests/judge/test_hints.py tests/judge/test_layouts.py \
	tests/judge/test_metrics.py tests/jobs/test_inspect.py tests/commands/test_before_sides.py

quick: .venv/dev
	.venv/bin/pytest -n 2 --dist worksteal $(QUICK)

test: .venv/dev
	.venv/bin/pytest -n 2 --dist worksteal

slow: .venv/dev
	.venv/bin/pytest -n 2 --dist worksteal -m 'slow and not thorough'

thorough: .venv/dev
	.venv/bin/pytest -n 2 --dist worksteal -m thorough

faults: .venv/dev
	.venv/bin/pytest -n 2 -m faults

check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/pytest tests/laws/test_shapes.py
	.venv/bin/python docs/generate.py --check

engines: .venv/dev
	.venv/bin/python benchmarks/engines.py --record docs/engines.json; code=$$?; \
	.venv/bin/python docs/generate.py && exit $$code

docs: .venv/dev
	.venv/bin/python docs/generate.py

screenshot: .venv/dev
	.venv/bin/python docs/screenshot.py

bench: .venv/dev
	.venv/bin/python benchmarks/replay.py

wheel: .venv/dev
	.venv/bin/python -m build --wheel --no-isolation

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt -e '.[report]'
	touch $@

.venv/dev: .venv/installed
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
