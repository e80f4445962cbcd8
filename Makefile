# Every target does its own set-up: it needs only Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: compare test test-versions lint format bench docs clean

compare: $(STAMP)
	$(BIN)/ka compare

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# The oldest and the newest transformers, and the libraries around it.
test-versions: .venv-oldest/.installed .venv-newest/.installed .venv-ecosystem/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile tests/hf
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadfile tests/hf
	OMP_NUM_THREADS=1 .venv-ecosystem/bin/python -m pytest -n 2 --dist loadfile tests/ecosystem

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/sphinx-build --fail-on-warning --quiet docs build/docs

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-* build

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ka-attention needs Python 3.10 or newer, this is %d.%d; set PYTHON=/path/to/python3" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $(STAMP)

# An environment that holds what requirements/ names, and finds all else in .venv.
LIBRARY := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-%/.installed: requirements/%.txt $(STAMP)
	$(BIN)/python -m venv --clear --without-pip .venv-$*
	echo "import site; site.addsitedir('$$($(BIN)/$(LIBRARY))')" > "$$(.venv-$*/bin/$(LIBRARY))/base.pth"
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/$*.txt
	.venv-$*/bin/python -c 'import transformers; print("$*: transformers", transformers.__version__)'
	touch $@
