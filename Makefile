# Everything below works from a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint bench clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[cpu]" --group dev
	touch $@

# The whole job on a synthetic world: ends in a table and runs/demo/report.html.
demo: $(STAMP)
	influencespace demo --out runs/demo

# Two processes: most of the time goes into waiting for Ray to start; in the order of the files, in which the slow ones are not
# last. One thread each: the tests run many small ones.
test: lint
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# What `make test` leaves out, e.g. a kill in every stage.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 python -m pytest -m slow

lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy

# The figures of the documents, anew; real data in INFLUENCESPACE_DATA. The extra is other packages, to compare with.
bench: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[cpu,bench]"
	python benchmarks/run.py all
	python benchmarks/render.py

clean:
	rm -rf $(VENV) runs .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
