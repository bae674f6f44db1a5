# Lethe. `make course` and `make test` do everything on a fresh machine that has Python 3.11-3.13; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # models this small gain little from threads
export HF_HUB_OFFLINE ?= 1
export PYTHONHASHSEED := 0

SCALE ?= emoji
JOBS ?= $(if $(filter paper,$(SCALE)),1,2)

.PHONY: help course test notebooks lab student teacher site bench tables clean
help:
	@echo "make course     execute every notebook in the emoji world into build/course/, with an index page"
	@echo "make test       ruff, pytest, and nbval over every notebook"
	@echo "make lab        open JupyterLab"
	@echo "make student    copies without outputs and solutions, in build/student/; make teacher: with a guide, in build/teacher/"
	@echo "make site       the course as a book from the committed outputs, in build/site/"
	@echo "make notebooks  execute every notebook in place (the one command that makes the committed outputs)"
	@echo "make bench      the benchmarks of tests/benchmarks"
	@echo "make tables     the papers' tables in the emoji world; SCALE=small or paper, JOBS=processes; may be killed and goes on"

$(VENV)/installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

course: $(VENV)/installed
	$(BIN)/python notebooks/execute.py build/course

notebooks: $(VENV)/installed
	$(BIN)/python notebooks/execute.py --in-place

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PARALLEL) --benchmark-skip
	$(PARALLEL) --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks

lab: $(VENV)/installed
	$(BIN)/jupyter lab notebooks

student teacher: $(VENV)/installed
	$(BIN)/python notebooks/editions.py $@

$(VENV)/site: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[site]'
	@touch $@

site: $(VENV)/site
	$(BIN)/python docs/site.py build/site-source
	$(BIN)/python -m sphinx -q -W --keep-going -b html build/site-source build/site
	@touch build/site/.nojekyll
	@echo "The site is ready: open build/site/index.html"

bench: $(VENV)/installed
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

tables: export HF_HUB_OFFLINE = $(if $(filter paper,$(SCALE)),0,1)
tables: $(VENV)/installed
	$(BIN)/snakemake --profile workflow/profiles/local -j'$(subst ','\'',$(JOBS))' --config 'scale=$(subst ','\'',$(SCALE))'

clean:
	rm -rf build
