# flexgate: `make serve` and `make test` need this checkout, Python 3.11 and, for the first run, a network.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
CLIENTS := build/clients
BIN := $(VENV)/bin
PORT ?= 8000
TIMES ?= 20
# The checkout's folders share names with other projects' packages: keep it off sys.path.
export PYTHONSAFEPATH := 1
# Tests start hundreds of processes: each would compile the sources again.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(BIN)/python -m pytest
# Benchmarks and kill harnesses, which do not ship, use the tests' kits.
MEASURE := benchmarks:tests/support
# Workers of a test run; tests/support/workers.py says which tests stay together.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
# A test that waits for ever fails, and says where all its threads waited; the slowest need a fifth of that.
SPREAD += --timeout=900 --timeout-method=signal -o faulthandler_timeout=840
# pip compiles on one core.
PIP_INSTALL := pip install -q --no-compile --no-deps
COMPILE := $(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true
# What chooses the cases of heavy tests: each commit tests others.
SEED ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo none)

.PHONY: help serve test test-slow lint bench bench-kernels evaluation expert-kills server-kills ledger-kills usage-kills demo-model defects mutants repeat-engine-tests test-clients test-client docs verify lock clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

serve: $(VENV)/.runtime ## Serve the demo model on 127.0.0.1:$(PORT) with three demo tenants.
	$(BIN)/flexgate serve --demo --port $(PORT)

test: $(VENV)/.dev ## Run the test suite (SLOW=1 with the slow tests, as CI does).
	$(PYTEST) $(SPREAD) $(if $(SLOW),--slice=$(SEED) --durations=30,-m "not slow")

test-slow: $(VENV)/.dev ## Run the slow tests alone; of the heaviest only a slice, chosen by the commit or SEED=….
	$(PYTEST) $(SPREAD) --slice=$(SEED) -m slow

lint: $(VENV)/.dev ## Ruff, mypy --strict, import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/typed $(BIN)/mypy -p flexgate
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## Measure speed and memory into docs/results (BENCH=NAME for one of them, BENCH="NAME --starts N --rounds N" for more).
	PYTHONPATH=$(MEASURE) $(BIN)/python -m speed $(BENCH)

bench-kernels: ## Check and time the kernels on a GPU: needs PYTHON with torch, Triton and NumPy, nothing else.
	mkdir -p build/kernels/flexgate && ln -sfn "$(CURDIR)/kernels" build/kernels/flexgate/kernels
	PYTHONPATH=build/kernels $(PYTHON) -m flexgate.kernels.bench $(ARGS)

evaluation: $(VENV)/.dev ## Compare ways to merge experts, from nothing, into docs (resumes if it was stopped).
	PYTHONPATH=$(MEASURE) $(BIN)/python -m merging $(ARGS)

expert-kills: $(VENV)/.dev ## Kill the process that adds and revokes experts 1,000 times; fail if a partial change remains.
	PYTHONPATH=$(MEASURE) $(BIN)/python -m kills.experts --kills 1000 --report docs/results/expert-kills.json

server-kills: $(VENV)/.dev ## Kill a server or its engine 50 times while experts change; fail if a restart serves anything but the last state.
	PYTHONPATH=$(MEASURE) $(BIN)/python -m kills.servers --kills 50 --report docs/results/server-kills.json

ledger-kills: $(VENV)/.dev ## Kill the process that writes a ledger 1,000 times; fail if a token was delivered and not recorded (ARGS as below).
	PYTHONPATH=$(MEASURE) $(BIN)/python -m kills.ledger --kills 1000 --report docs/results/ledger-kills.json $(ARGS)

usage-kills: $(VENV)/.dev ## Kill a server or its engine 30 times under load; fail if a recount finds other usage (ARGS="--kept FOLDER --minutes N" for a piece).
	PYTHONPATH=$(MEASURE) $(BIN)/python -m kills.usage --kills 30 --report docs/results/usage-kills.json $(ARGS)

demo-model: $(VENV)/.dev ## Retrain the demo model from nothing.
	$(BIN)/python -m flexgate.experts.demo

defects: $(VENV)/.dev ## Plant every defect; fail if its tests still pass (ARGS="NAME …", ARGS=--check).
	$(BIN)/python tests/defects/run.py $(ARGS)

mutants: $(VENV)/.dev ## Mutate the decision code, one place at a time; fail if the tests miss more than 5 %.
	$(BIN)/python tests/policies/mutate.py

repeat-engine-tests: $(VENV)/.dev ## Run every engine test TIMES times (20), to find flaky ones.
	PYTHONPATH=tests/support $(PYTEST) -p enginekit.repeat --repeat $(TIMES) -m engine tests/server/engine

test-clients: $(VENV)/.runtime $(CLIENTS)/.installed $(CLIENTS)/inspect/.installed $(CLIENTS)/.node ## Run real clients against the demo, in environments of their own (needs Node 20 and npm).
	cd tests/clients && "$(abspath $(CLIENTS))/bin/python" -m pytest -p no:cacheprovider $(ARGS)

test-client: $(VENV)/.dev ## Run one client (CLIENT=agents, as in tests/clients/test_agents.py) in an environment with nothing else.
	$(MAKE) --no-print-directory $(CLIENT_NEEDS)
	cd tests/clients && "$(abspath $(CLIENT_PYTHON))" -m pytest -p no:cacheprovider test_$(CLIENT).py $(ARGS)

# What a client needs: its part of the lock and pytest; or something beside the development environment, which has pytest.
CLIENT ?= openai
ONE = $(CLIENTS)/one/$(CLIENT)
CLIENT_NEEDS = $(or $(NEEDS_$(CLIENT)),$(ONE)/.installed)
CLIENT_PYTHON = $(if $(NEEDS_$(CLIENT)),$(BIN),$(ONE)/bin)/python
NEEDS_node := $(CLIENTS)/.node
NEEDS_inspect := $(CLIENTS)/inspect/.installed
NEEDS_vllm_bench := $(VENV)/.dev
# guidellm and lm-eval need transformers, and torch with networkx, sympy and jinja2: the one that is pinned for CPUs, not 3 GB of CUDA.
TORCH := -r locks/torch-cpu.txt
with_torch = $(if $(filter guidellm lm_eval,$*),$(1))

$(CLIENTS)/.installed: locks/clients.txt locks/torch-cpu.txt
	$(call install,$(CLIENTS),-r locks/clients.txt $(TORCH))

$(CLIENTS)/inspect/.installed: locks/inspect.txt
	$(call install,$(CLIENTS)/inspect,-r locks/inspect.txt)

$(CLIENTS)/one/%/.installed: locks/clients.txt locks/torch-cpu.txt tests/clients/test_%.py
	mkdir -p $(@D)
	$(PYTHON) tests/clients/closure.py locks/clients.txt pytest pytest-asyncio $(call with_torch,jinja2 networkx sympy transformers) \
	  "$$(sed -n 's/^CLIENT, PACKAGE = .*, "\(.*\)"$$/\1/p' tests/clients/test_$*.py)" > $(@D)/lock.txt
	$(call install,$(@D),-r $(@D)/lock.txt $(call with_torch,$(TORCH)))

$(CLIENTS)/.node: tests/clients/package-lock.json
	cd tests/clients && $(WITHIN) npm ci --ignore-scripts --no-audit --no-fund --loglevel=error || $(TOO_SLOW)
	mkdir -p $(@D) && touch $@

# Install into an environment from locks; give up clearly where a registry does not answer.
INSTALL_SECONDS ?= 1200
WITHIN := timeout -k 10 $(INSTALL_SECONDS)
TOO_SLOW = { echo "cannot install $(@D): the registry refused, or did not answer within $(INSTALL_SECONDS) s" >&2; exit 1; }
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(WITHIN) $(1)/bin/python -m $(PIP_INSTALL) --require-hashes $(2) || $(TOO_SLOW)
	touch $(1)/.installed
endef

docs: $(VENV)/.dev ## Build the documentation into build/site; fail on a broken link.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

verify: $(VENV)/.dev ## Run everything: tests, defects, mutants, kills (STEPS="…" for some; resumes if it was stopped).
	$(BIN)/python tests/verify.py $(STEPS)

lock: ## Pin and hash what locks/*.in name (needs uv).
	for part in cpu dev; do uv pip compile --no-deps --generate-hashes --universal \
	  --python-version 3.11 --no-header --no-annotate -q locks/$$part.in -o locks/$$part.txt; done
	uv pip compile --generate-hashes --python-version 3.11 --no-header --no-annotate -q locks/inspect.in -o locks/inspect.txt
	uv pip compile --excludes <(echo torch) --generate-hashes --python-version 3.11 --no-header --annotation-style line -q locks/clients.in -o locks/clients.txt

clean: ## Remove the environment and caches.
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Everything is installed from hashed locks without dependency resolution: vLLM's own
# requirements pull CUDA builds of torchvision that break transformers on CPU.
$(VENV)/.runtime: locks/cpu.txt locks/torch-cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "flexgate needs Python 3.11, whose PyTorch the lock file pins; run: make PYTHON=python3.11 …")'
	@echo "installing about 3.5 GB into $(VENV); this takes a minute or more"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(PIP_INSTALL) --require-hashes -r locks/cpu.txt -r locks/torch-cpu.txt
	$(COMPILE)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	for place in "$$site" build/typed; do mkdir -p "$$place/flexgate"; \
	  for package in policies kernels experts server; do \
	    ln -sfn "$(CURDIR)/$$package" "$$place/flexgate/$$package"; done; done
	touch $@

$(VENV)/.dev: $(VENV)/.runtime locks/dev.txt
	$(BIN)/python -m $(PIP_INSTALL) --require-hashes -r locks/dev.txt
	$(COMPILE)
	touch $@
