# `make` lists the targets. Each one first completes .venv; when that is complete already, it costs nothing.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install check format test soak cluster-test package demo nightly-demo ml-1m bench extras docs lock audit sbom clean

# Choose another with `make PYTHON=/path/to/python3.11 install`.
PYTHON ?= $(firstword $(shell command -v python3.11 || command -v python3) python3.11)
# The folder with ml-1m/, ml-100k/ and so on; tests that need it are skipped, and `make ml-1m` downloads, where it does not exist.
NCF_DATA_DIR ?= $(CURDIR)/../shared/data
export NCF_DATA_DIR
# What `make ml-1m` trains: history, or neumf.
MODEL ?= history
# The extras that have a lock of their own.
EXTRAS ?= ops sweep
# Processes that share the tests, each with a Spark session of its own.
TEST_WORKERS ?= 2

python := .venv/bin/python
ml_1m := conf/ml-1m$(if $(filter neumf,$(MODEL)),,-$(MODEL)).yaml
log := .venv/install.log
pip = $(python) -m pip --disable-pip-version-check --no-input
failed = { tail -n 5 $(log); echo "ncf-dist: $(1) failed; the whole story is in $(log). Fix the cause and run make install again."; exit 2; } >&2
# Recipes that start a JVM use the one that spark-submit.sh would use.
java = JAVA_HOME="$$(./spark-submit.sh --java-home)"

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## build .venv: Python packages and this project (needs Python 3.11 or 3.10 and Java 17 to 21)

python_version = $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
wrong_python = $(if $(filter 3.10.% 3.11.%,$(python_version)),,Python 3.11 or 3.10 is needed, \
  found $(or $(python_version),none) at $(PYTHON); run apt-get install python3.11 python3.11-venv, or make PYTHON=/path/to/python3.11 install)
wrong_java = $(shell ./spark-submit.sh --java-home 2>&1 >/dev/null)

# What is downloaded must have a SHA-256 that requirements.lock names. What comes as source is built by the setuptools of
# the lock, which is installed before it: pip would fetch one of its own, unchecked.
checked = $(pip) install --no-deps --require-hashes --no-build-isolation
# What pip says goes to the log; of it a person sees how far it is: on a terminal each package, elsewhere what takes long.
shown = tee -a $(log) | { end=''; while read -r first second rest; do \
  case "$$first $$rest" in \
    Collecting*) if [ -t 1 ]; then printf '\r\033[K      %s' "$$second"; end='\r\033[K'; fi;; \
    Downloading*[0-9][0-9].[0-9]\ MB*|Downloading*GB*) printf "$$end      %s %s\n" "$$second" "$$rest"; end='';; \
    Installing*packages*) printf "$$end      unpacking %d packages\n" $$(($$(wc -w <<<"$$rest") - 1)); end='';; \
  esac; done; printf "$$end"; }
build_tool = sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock

# The stamp is written last. Without it .venv is half made, so it is built afresh; with an old one it is brought up to date in place.
.venv/.installed: requirements-torch.txt requirements.lock pyproject.toml $(wildcard ncf_dist/*/*.cpp) $(python)
	$(if $(wrong_python),$(error $(wrong_python)))
	$(if $(wrong_java),$(error $(wrong_java)))
	@if [ ! -e $@ ] || ! $(pip) --version >/dev/null 2>&1; then \
	  echo "[1/5] .venv with Python $(python_version)"; \
	  rm -rf .venv; mkdir .venv; \
	  { $(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(python) install pip; }; } \
	    >$(log) 2>&1 || $(call failed,making .venv); \
	fi; rm -f $@
	@echo "[2/5] the packages of requirements.lock"
	@{ $(checked) -r <($(build_tool)) && $(checked) -r requirements.lock; } 2>&1 | $(shown) || $(call failed,installing requirements.lock)
	@echo "[3/5] torch, the largest download"
	@$(pip) install -r requirements-torch.txt 2>&1 | $(shown) || $(call failed,installing torch)
	@echo "[4/5] ncf-dist itself"
	@$(pip) install --no-deps --no-build-isolation -e . >>$(log) 2>&1 || $(call failed,installing ncf-dist)
	@echo "[5/5] an archive of Spark's classes"
	@if [ ! .venv/.spark-classes -nt requirements.lock ]; then \
	  $(java) $(python) -m ncf_dist.spark_classes >>$(log) 2>&1 || echo "      not made, so Spark starts slower; why is in $(log)"; \
	  touch .venv/.spark-classes; \
	fi
	@touch $@

# No recipe: a .venv whose Python is gone counts as changed.
$(python): ;

check: install ## lint, format, types, import rules
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	.venv/bin/lint-imports

format: install ## rewrite the code in the house format and fix what the linter can
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

# Tests keep their lakes in memory where that has room: a job waits until each file that it writes is on the disk.
room = $(shell df -Pk /dev/shm 2>/dev/null | awk '$$6 == "/dev/shm" && $$4 > 4 * 2^20 {print $$6}')
runs_nothing = $(shell grep -s '^[^ ]* /dev/shm [^ ]* [^ ]*noexec' /proc/mounts)
lakes = $(if $(runs_nothing),,$(room:%=%/ncf-tests-$(shell id -u)-$(firstword $(shell pwd | cksum))))

test: install ## run the tests; PYTEST_ARGS="-k negatives -x" chooses
	lakes="$(lakes)"; $(java) $(python) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations 20 -m "not soak and not cluster" $${lakes:+--basetemp "$$lakes"} $(PYTEST_ARGS); rm -rf "$$lakes"

soak: install ## run the long campaigns of kills, races and mutated input: before a release, and by hand
	$(java) $(python) -m pytest -m soak --timeout 3600 $(PYTEST_ARGS)

cluster-test: package ## run a night on three machines of namespaces, which need root, as a cluster runs it
	$(java) $(python) -m pytest -m cluster --timeout 1500 $(PYTEST_ARGS)

environment := dist/ncf-dist-env-$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' ncf_dist/__init__.py 2>/dev/null).tar.gz

package: install $(environment) ## write dist/ncf-dist-env-VERSION.tar.gz and -jobs-VERSION.zip: what a cluster's machines need
	$(python) -m ncf_dist.pack --code

$(environment): .venv/.installed ncf_dist/pack.py
	$(python) -m ncf_dist.pack

demo: install ## made-up data to published recommendations, in minutes
	./spark-submit.sh fetch --config conf/demo.yaml
	./spark-submit.sh nightly --config conf/demo.yaml
	$(python) -m ncf_dist.demo --config conf/demo.yaml

nightly-demo: install ## a week of nights, with what goes wrong in a year, in minutes
	$(python) -m ncf_dist.week --config conf/nightly-demo.yaml

ml-1m: install ## the same on MovieLens 1M, from NCF_DATA_DIR or downloaded; MODEL=neumf: with NeuMF
	source=(); if [ -d "$$NCF_DATA_DIR/ml-1m" ]; then source=(--set "fetch.from=$$NCF_DATA_DIR/ml-1m"); fi; \
	./spark-submit.sh fetch --config $(ml_1m) "$${source[@]}"
	./spark-submit.sh nightly --config $(ml_1m)
	$(python) -m ncf_dist.demo --config $(ml_1m)

bench: install ## run every script in benchmarks/; those for GPUs where there is one
	export $(java); gpu=$$($(python) -c 'import torch; print(torch.cuda.is_available())'); \
	for script in benchmarks/[!_]*.py; do \
	  case "$$gpu $$script" in \
	    False*gpu*) echo "== $$script is left out: torch sees no GPU here";; \
	    *) echo "== $$script"; $(python) -m "benchmarks.$$(basename "$$script" .py)";; \
	  esac; \
	done

extras: install ## install what the extras need (ops, sweep), from their locks; EXTRAS=sweep chooses
	for name in $(EXTRAS); do $(checked) -r requirements-$$name.lock; done

# The extras' locks go on top of the environment's own, whose pins hold.
lock: install ## resolve requirements.in, and those of the audit and the extras, again into their locks, with hashes
	$(pip) install --quiet uv
	compile() { $(python) -m uv pip compile "$$1.in" "$${@:2}" --override requirements-override.txt --universal \
	    --python-version 3.10 --generate-hashes --upgrade --no-emit-index-url --custom-compile-command "make lock" \
	    --quiet -o "$$1.lock"; }; \
	for name in requirements requirements-audit; do compile $$name; done; \
	for name in $(EXTRAS); do compile requirements-$$name -c requirements.lock -c requirements-torch.txt; done

# Tools that are no part of the environment live in one of their own, which is gone afterwards.
with_tools = tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; $(python) -m venv --without-pip "$$tools"; \
  $(pip) --python "$$tools/bin/python" install --quiet --require-hashes -r requirements-audit.lock

# pip-audit's sources, in order. A registry that serves packages need not know advisories, and where it does not, pip-audit
# finds "no known vulnerabilities": so a source is believed only after it has named one that we know of.
ADVISORIES ?= pypi osv
known = pyarrow==14.0.0
known_for = CVE-2023-47248

audit: install ## look up known vulnerabilities of everything that is pinned
	@$(with_tools); audit() { "$$tools/bin/pip-audit" --progress-spinner off --disable-pip --no-deps "$$@"; }; \
	echo "$(known)" >"$$tools/known.txt"; \
	for source in $(ADVISORIES); do \
	  audit -s $$source -r "$$tools/known.txt" -f json -o "$$tools/known.json" >"$$tools/log" 2>&1 || true; \
	  if grep -qs "$(known_for)" "$$tools/known.json"; then \
	    echo "ncf-dist: advisories from $$source"; \
	    pinned() { sed -e '/--hash=/d' -e 's/ \\$$//' "$$@"; }; \
	    pinned requirements.lock requirements-torch.txt >"$$tools/pinned.txt"; \
	    for lock in $(wildcard $(EXTRAS:%=requirements-%.lock)); do pinned $$lock >"$$tools/pinned-$$lock.txt"; done; \
	    for list in "$$tools"/pinned*.txt; do audit -s $$source --strict -r "$$list"; done; exit; \
	  fi; \
	done; \
	{ tail -n 1 "$$tools/log"; \
	  echo "ncf-dist: NOTHING WAS AUDITED: none of $(ADVISORIES) says that $(known) has $(known_for), so no source of" \
	    "advisories is reachable here; run make audit where one is, or name others with ADVISORIES"; exit 3; } >&2

docs: install ## write docs/settings.md from ncf_dist/config/
	$(python) -m ncf_dist.reference >docs/settings.md

sbom: install ## write dist/sbom.cdx.json, what .venv holds, as a CycloneDX bill of materials
	@$(with_tools); mkdir -p dist; \
	"$$tools/bin/cyclonedx-py" environment --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json $(python); \
	echo "ncf-dist: dist/sbom.cdx.json"

clean: ## remove caches and scratch; .venv and the lake stay
	rm -rf work build dist spark-warehouse metastore_db derby.log .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
