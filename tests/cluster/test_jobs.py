"""FineTuneJobs from apply to delete on a real cluster: real models, live status, artifacts, evidence, nothing left behind."""

import hashlib
import json
import time
from datetime import datetime

import pytest
from finetune_api.constants import JOB_LABEL

from tests.cluster import kit
from tests.cluster.workbench import (
    EXAMPLE,
    MINILM,
    Workbench,
    tiny_classification,
    tiny_generation,
)

READ_ARTIFACTS = """
import hashlib, json, pathlib
root = pathlib.Path('/workspace/artifacts')
sums = (root / 'SHA256SUMS').read_bytes()
for line in sums.decode().splitlines():
    digest, name = line.split('  ', 1)
    assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest, name
print(json.dumps({'files': sorted(p.name for p in root.iterdir()), 'sums': hashlib.sha256(sums).hexdigest(),
                  'evaluation': json.loads(pathlib.Path('/workspace/report/evaluation.json').read_text())}))
"""

JUDGE_ADAPTER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base = AutoModelForSequenceClassification.from_pretrained('/models/minilm', num_labels=3)
model = PeftModel.from_pretrained(base, '/workspace/artifacts').eval()
tokenizer = AutoTokenizer.from_pretrained('/workspace/artifacts')
rows = [json.loads(line) for line in sys.stdin]
labels = ['negative', 'neutral', 'positive']
right = 0
with torch.no_grad():
    for i in range(0, len(rows), 32):
        batch = rows[i : i + 32]
        inputs = tokenizer([row['text'] for row in batch], return_tensors='pt', padding=True, truncation=True, max_length=64)
        predicted = model(**inputs).logits.argmax(-1).tolist()
        right += sum(labels[p] == row['label'] for p, row in zip(predicted, batch))
print(right / len(rows))
"""


def remaining_objects(namespace: str, job: str) -> list[str]:
    kinds = "ftj,jobs,pods,cm,pvc,networkpolicies,services"
    return kit.kubectl("-n", namespace, "get", kinds, "-l", f"{JOB_LABEL}={job}", "-o", "name").split()


def wait_until_gone(namespace: str, job: str, timeout: float = 90) -> None:
    def gone() -> bool:
        return not remaining_objects(namespace, job)

    kit.wait_until(gone, timeout, f"all objects of {job} gone", lambda: "\n".join(remaining_objects(namespace, job)))


def operator_metrics() -> str:
    """Metrics of the replica that leads."""
    for pod in kit.operator_pods():
        text = kit.http_get(kit.SYSTEM_NAMESPACE, pod["metadata"]["name"], 8080, "/metrics")
        if "finetune_operator_leader 1.0" in text:
            return text
    raise AssertionError("no replica leads")


def test_a_real_model_is_tuned_watched_proved_published_and_deleted(workbench: Workbench) -> None:
    sources = {
        split: [{"uri": f"configmap://financial-sentiment/{split}.jsonl"}] for split in ("train", "validation", "test")
    }
    name = workbench.submit(
        {
            "task": "Classification",
            "model": {"uri": MINILM},
            "dataset": {
                "sources": sources["train"],
                "validation": {"sources": sources["validation"]},
                "test": {"sources": sources["test"]},
                "labels": ["negative", "neutral", "positive"],
            },
            "training": {"epochs": 2, "learningRate": 0.002, "maxLength": 64},
            "evaluation": {"gate": {"metric": "macroF1", "minimumGain": 0.2}},
            "resources": {"gpus": 1, "allowCpuFallback": True, "requests": {"cpu": "1", "memory": "1Gi"}},
            "workspace": {"size": "2Gi"},
        }
    )
    pod = workbench.running_pod(name, "train", timeout=150)
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["spec"]["automountServiceAccountToken"] is False

    staleness, percentages, seen = [], [], {}
    while (status := workbench.status(name))["phase"] not in ("Publishing", "Succeeded", "Failed"):
        progress = status.get("progress") or {}
        if status["phase"] == "Training" and progress.get("step"):
            updated = datetime.fromisoformat(progress["lastUpdatedTime"].replace("Z", "+00:00")).timestamp()
            staleness.append(time.time() - updated)
            percentages.append(progress["percentage"])
            seen |= status.get("metrics", {}) | progress
            if len(staleness) == 3:
                assert f'finetune_operator_job_progress_ratio{{name="{name}"' in operator_metrics()
                metrics = workbench.python(
                    pod["metadata"]["name"],
                    "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9400/metrics').read().decode())",
                )
                assert "finetune_trainer_training_loss" in metrics
        time.sleep(1)
    assert len(staleness) >= 3, "the training was too short to be watched"
    assert max(staleness) <= 10
    assert percentages == sorted(percentages)
    expected = {
        "trainingLoss",
        "learningRate",
        "tokensPerSecond",
        "peakMemoryBytes",
        "step",
        "totalSteps",
        "epoch",
        "eta",
    }
    assert expected <= seen.keys()

    job = kit.wait_for_phase(workbench.namespace, name, kit.Phase.SUCCEEDED, 120)
    status = job["status"]
    assert status["progress"]["percentage"] == 100
    assert kit.condition(job, "Complete")["status"] == "True"
    assert kit.condition(job, "GatePassed")["reason"] == "Passed"
    scores = {score["metric"]: score for score in status["result"]["scores"]}
    assert float(scores["macroF1"]["value"]) > float(scores["macroF1"]["baseline"]) + 0.2
    assert status["data"]["labels"] == ["negative", "neutral", "positive"]
    assert status["resolved"]["device"] and status["resolved"]["precision"]
    reasons = kit.wait_for_events(workbench.namespace, name, {"Preparing", "Training", "Publishing", "Succeeded"})
    assert len(reasons) == len(set(reasons)), "an Event is recorded once"

    with workbench.helper("reader", {f"{name}-workspace": "/workspace", "models": "/models"}) as reader:
        found = json.loads(workbench.python(reader, READ_ARTIFACTS))
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(found["files"])
        assert found["sums"] == status["result"]["artifact"]["sha256"]
        evaluation = found["evaluation"]
        assert sum(map(sum, evaluation["tuned"]["confusion"])) == status["data"]["testRows"] == evaluation["rows"]
        test_rows = (EXAMPLE / "test.jsonl").read_text()
        accuracy = float(workbench.python(reader, JUDGE_ADAPTER, timeout=180, input=test_rows))
        assert accuracy == pytest.approx(float(scores["accuracy"]["value"]), abs=0.005), "plain peft loads the adapter"

    kit.wait_until(lambda: f'name="{name}"' not in operator_metrics(), 30, "a finished job's series gone")
    claim = kit.get("pvc", f"{name}-workspace", workbench.namespace)
    assert claim is not None
    workbench.delete(name)
    wait_until_gone(workbench.namespace, name)
    volume = claim["spec"]["volumeName"]
    kit.wait_until(lambda: kit.get("pv", volume, workbench.namespace) is None, 60, "the volume gone")


def test_kubectl_shows_the_columns(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification(suspend=True))
    workbench.wait(name, "Suspended", 60)
    header = kit.kubectl("-n", workbench.namespace, "get", "ftj", name, "-o", "wide").splitlines()[0].split()
    assert header[:4] == ["NAME", "PHASE", "PROGRESS", "METRIC"]
    assert {"ETA", "AGE", "MODEL", "METHOD", "ATTEMPT", "GPUS", "MESSAGE"} <= set(header)
    assert name in kit.kubectl("-n", workbench.namespace, "get", "all")
    workbench.delete(name)


@pytest.mark.parametrize("output", ["Adapter", "Merged"])
def test_a_generation_model_is_tuned(workbench: Workbench, output: str) -> None:
    name = workbench.submit(tiny_generation(output={"format": output}))
    status = workbench.wait(name, "Succeeded")["status"]
    scores = {score["metric"]: score for score in status["result"]["scores"]}
    assert float(scores["loss"]["value"]) < float(scores["loss"]["baseline"])
    assert status["result"]["baseline"]
    assert status["data"]["supervisedTokens"] < status["data"]["tokens"], "only the answers have a loss"
    assert status["result"]["artifact"]["format"] == output
    workbench.delete(name)


def test_the_result_goes_into_another_claim_and_a_retained_workspace_stays(workbench: Workbench) -> None:
    spec = tiny_classification(
        output={"uri": f"pvc://models/results/{hashlib.sha256(str(time.time()).encode()).hexdigest()[:8]}"},
        workspace={"size": "1Gi", "retain": True},
    )
    name = workbench.submit(spec)
    status = workbench.wait(name, "Succeeded")["status"]
    assert status["result"]["artifact"]["uri"] == spec["output"]["uri"]
    workbench.delete(name)
    kit.wait_until(lambda: not kit.pods(workbench.namespace, name), 60, "the pods gone")
    assert kit.get("pvc", f"{name}-workspace", workbench.namespace) is not None
    folder = spec["output"]["uri"].removeprefix("pvc://models")
    with workbench.helper("reader", {"models": "/models"}) as reader:
        listing = workbench.python(reader, f"import os; print(sorted(os.listdir('/models{folder}')))")
    assert "SHA256SUMS" in listing

    again = workbench.submit(tiny_classification(), name)
    failed = workbench.wait(again, "Failed", 60)
    assert failed["status"]["failure"]["reason"] == "NameClash", "the kept volume is not taken over in silence"
    assert f"{name}-workspace" in failed["status"]["message"]
    workbench.delete(name)
    kit.kubectl("-n", workbench.namespace, "delete", "pvc", f"{name}-workspace", "--wait=false")


def test_a_shared_claim_holds_a_folder_of_the_job(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification(workspace={"claimName": "models"}))
    job = workbench.wait(name, "Succeeded")
    folder = f"{name}-{job['metadata']['uid'][:8]}"
    assert job["status"]["result"]["artifact"]["uri"] == f"pvc://models/{folder}/artifacts"
    with workbench.helper("reader", {"models": "/models"}) as reader:
        listing = workbench.python(reader, f"import os; print(sorted(os.listdir('/models/{folder}')))")
    assert "artifacts" in listing and "checkpoints" in listing
    workbench.delete(name)
    assert kit.get("pvc", "models", workbench.namespace) is not None
