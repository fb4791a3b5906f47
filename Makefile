# Everything runs in .venv and needs no GPU; a line that starts with a name and `##` is listed by `make help`.
# Variables: EXTRA=cpu|gpu (which vLLM), PYTHON, THREADS, CONTROLS=1 (quickstart), K="expression" (pytest -k).

PYTHON  ?= python3
EXTRA   ?= cpu
THREADS ?= $(shell nproc 2>/dev/null || echo 2)
TORCH   ?= torch==2.13.0
K       ?=

BIN    := .venv/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check
LOCKED := .venv/.locked-$(EXTRA)
STAMP  := .venv/.installed-$(EXTRA)
PYTEST  = $(BIN)/python -m pytest $(if $(K),-k "$(K)")
FAST    = -m "not dist and not vllm and not slow"
USED    = tests/recipes tests/trl $(wildcard tests/test_*_benchmark.py)
APART   = $(addprefix --ignore=,tests/reward tests/objectives $(USED))
PUBLIC  = $(wildcard llm_xrisk reward recipes tests benchmarks)
BROKEN := torchvision torchaudio torchcodec

.DEFAULT_GOAL := help
.PHONY: help venv quickstart quickstart-seeds test test-fast test-objectives test-recipes test-reward test-dist \
        test-vllm test-slow check test-matrix bench bench-outcomes lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv and install what is missing (GPU machine: make venv EXTRA=gpu)

# torch comes first and by itself: the right build of it is the environment's to choose.
$(LOCKED): requirements/lock.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade pip
ifeq ($(EXTRA),cpu)
	$(PIP) install "$(TORCH)"
	$(PIP) install --no-deps -r requirements/lock.txt
	$(PIP) uninstall --quiet -y $(BROKEN)
endif
	touch $@

$(STAMP): $(LOCKED) pyproject.toml
ifeq ($(EXTRA),cpu)
	$(PIP) install --quiet --no-deps -e .
else
	$(PIP) install -e ".[$(EXTRA),deepspeed,math,dev]"
endif
	touch $@

quickstart: venv ## the main job: base, negatives, DFT, DisCO, table, report (CONTROLS=1 adds SFT and GRPO)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python recipes/quickstart.py $(if $(filter 1,$(CONTROLS)),--controls)

quickstart-seeds: venv ## the main job over 5 seeds with paired intervals, written to benchmarks/results/
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python recipes/quickstart.py --seeds 5 --controls \
		--results_file benchmarks/results/quickstart-seeds-cpu.json

test: venv ## every tier, in order; fails if one of them fails
	@failed=; for tier in fast objectives recipes reward dist vllm; do \
		$(MAKE) --no-print-directory test-$$tier || failed="$$failed $$tier"; \
	done; \
	if [ -n "$$failed" ]; then echo "FAILED tiers:$$failed"; exit 1; else echo "all tiers passed"; fi

test-fast: venv ## one process: the core, data, models, trainers: three minutes at most
	$(PYTEST) $(FAST) $(APART) --durations=5

test-objectives: venv ## every objective's contract: loops, precision, labels, resume, compilation
	$(PYTEST) $(FAST) tests/objectives --durations=5

test-recipes: venv ## recipes, benchmarks and TRL pipelines, run as a user runs them
	$(PYTEST) $(FAST) $(USED) --durations=5

test-reward: venv ## the verifiers: hostile answers, worker pools, sandboxes
	$(PYTEST) tests/reward -m "not slow" --durations=5

test-dist: venv ## two CPU processes: gloo, ZeRO-2, ZeRO-3
	$(PYTEST) -m "dist and not slow" --durations=5

test-vllm: venv ## a real vLLM on the CPU
	$(PYTEST) -m "vllm and not dist and not slow" --durations=5

test-slow: venv ## what takes minutes a test; not part of `make test`
	$(PYTEST) -m slow --durations=5

check: venv ## lint, format, types, doctests
	$(BIN)/ruff check $(PUBLIC)
	$(BIN)/ruff format --check $(PUBLIC)
	$(BIN)/pyright
	$(BIN)/python -m pytest --doctest-modules --doctest-continue-on-failure llm_xrisk $(wildcard reward)

# Two environments of their own: the oldest versions pyproject.toml allows, and the newest. No vLLM, which wants
# one exact torch. They may hold a torch built for CUDA, several gigabytes each.
test-matrix: ## test-fast and test-objectives on the oldest and the newest dependencies
	@failed=; for age in oldest newest; do \
		test -x .venv-$$age/bin/python || $(PYTHON) -m venv .venv-$$age || exit 1; \
		.venv-$$age/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
			-r requirements/$$age.txt || exit 1; \
		.venv-$$age/bin/python -m pytest $(FAST) --ignore=tests/reward || failed="$$failed $$age"; \
	done; \
	if [ -n "$$failed" ]; then echo "FAILED with:$$failed"; exit 1; fi

bench: venv ## run the benchmarks of speed that need no GPU; they print ratios
	for name in objectives trl_step verifier serving; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done

# LIBAUC=PATH runs LibAUC beside imbalanced.py, by the interpreter of an environment of its own; see libauc_peer.py.
bench-outcomes: venv ## what the classic X-risks come to on real data: half an hour to an hour each, resumable
	$(PIP) install --quiet "scikit-learn>=1.5" "lightgbm>=4.5"
	for name in contrastive clip drrho extreme_classification ranking tempnet "imbalanced $(if $(LIBAUC),--libauc-python $(LIBAUC))"; do \
		set -- $$name; script=$$1; shift; OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$script.py "$$@" || exit 1; done

lock: ## rewrite requirements/lock.txt from .venv, keeping its heading
	{ sed -n '/^#/p' requirements/lock.txt; $(PIP) freeze --exclude-editable \
		| sed 's/+cpu$$//; s/ @ .*//' | grep -viE '^(llm-xrisk|$(subst $() ,|,$(BROKEN)))(=|$$)'; } > requirements/lock.new
	mv requirements/lock.new requirements/lock.txt

clean: ## remove caches and build outputs, not .venv
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
