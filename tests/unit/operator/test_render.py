"""The children of each stage: what runs, where, with which rights, and what it sees."""

import json
import re
from itertools import chain
from typing import Any

import pytest
from finetune_api.constants import HASH_ANNOTATION, NAME_LENGTH, Stage
from finetune_api.plan import Plan
from finetune_api.rules import parse_spec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.layout import PodLayout
from finetune_operator.observed import (
    Key,
    Manifest,
    Resource,
    is_owned_by,
    is_suspended_by_us,
    job_name_of,
    manifest_hash_of,
    stage_of,
)
from finetune_operator.plans import build_plan
from finetune_operator.render import render_stage
from finetune_operator.settings import Settings
from hypothesis import given, settings
from hypothesis import strategies as st

UID = "0f3a9c52-1111-2222-3333-444455556666"
LAYOUT = PodLayout()
SETTINGS = Settings(trainer_image="registry/trainer:1", operator_namespace="operators")
DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"


def render(
    stage: Stage = Stage.TRAIN,
    name: str = "demo",
    where: Settings = SETTINGS,
    suspended: bool = False,
    **spec: Any,
) -> dict[str, Manifest]:
    """What belongs to the stage alone, by kind: all but the NetworkPolicies, which test_render_network is about."""
    whole = {
        "task": "Classification",
        "model": {"uri": "hf://owner/name"},
        "dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}]},
    } | spec
    resource = Resource(Key("team", name), UID, 1, False, whole, FineTuneJobStatus())
    parsed = parse_spec(whole)
    plan = build_plan(resource, parsed, stage, LAYOUT)
    children = render_stage(resource, parsed, plan, where, LAYOUT, suspended=suspended)
    own = [child for child in children if child["kind"] != "NetworkPolicy"]
    assert children[-len(own) :] == own, "no pod is made before its policies"
    by_kind = {child["kind"]: child for child in own}
    assert len(by_kind) == len(own)
    return by_kind


def pod_of(children: dict[str, Manifest]) -> Manifest:
    return children["Job"]["spec"]["template"]["spec"]


def container(children: dict[str, Manifest]) -> Manifest:
    (only,) = pod_of(children)["containers"]
    return only


def volumes(children: dict[str, Manifest]) -> dict[str, Manifest]:
    return {volume["name"]: volume for volume in pod_of(children)["volumes"]}


def mounts(children: dict[str, Manifest]) -> dict[str, Manifest]:
    return {mount["mountPath"]: mount for mount in container(children)["volumeMounts"]}


def plan_of(children: dict[str, Manifest]) -> Plan:
    return Plan.model_validate_json(children["ConfigMap"]["data"]["plan.json"])


# names, owners, order


def test_the_job_comes_last_when_all_that_its_pods_need_is_there():
    assert list(render(Stage.PREPARE)) == ["PersistentVolumeClaim", "ConfigMap", "Job"]
    for stage in (Stage.TRAIN, Stage.PUBLISH):
        assert list(render(stage)) == ["ConfigMap", "Job"]


@pytest.mark.parametrize("stage", list(Stage))
def test_children_are_found_again_by_their_labels_and_their_owner(stage):
    children = render(stage)
    workspace = children.pop("PersistentVolumeClaim", None)
    for child in children.values():
        assert child["metadata"]["name"] == f"demo-{stage}"
        assert child["metadata"]["namespace"] == "team"
        assert (job_name_of(child), stage_of(child)) == ("demo", stage)
        assert is_owned_by(child, UID)
    template = children["Job"]["spec"]["template"]
    assert (job_name_of(template), stage_of(template)) == ("demo", stage)
    if workspace:
        assert workspace["metadata"]["name"] == "demo-workspace"
        assert is_owned_by(workspace, UID)


def test_a_workspace_that_is_to_be_kept_has_no_owner_but_tells_whose_it_was():
    kept = render(Stage.PREPARE, workspace={"retain": True})["PersistentVolumeClaim"]["metadata"]
    assert "ownerReferences" not in kept
    assert kept["annotations"]["finetune-operator.io/job-uid"] == UID
    assert kept["labels"]["finetune-operator.io/job"] == "demo"


def test_the_hash_tells_a_changed_job_but_not_a_suspended_one():
    same = manifest_hash_of(render()["Job"])
    assert re.fullmatch(r"[0-9a-f]{64}", same)
    assert manifest_hash_of(render(suspended=True)["Job"]) == same
    assert manifest_hash_of(render(limits={"retries": 1})["Job"]) != same
    assert manifest_hash_of(render(training={"seed": 1})["ConfigMap"]) != manifest_hash_of(render()["ConfigMap"])


def test_the_plan_cannot_be_changed_and_is_the_one_that_the_trainer_is_pointed_to():
    children = render(Stage.PUBLISH)
    assert plan_of(children).stage is Stage.PUBLISH
    assert container(children)["args"] == ["publish", "--plan", "/plan/plan.json"]
    assert mounts(children)["/plan"] == {"name": "plan", "mountPath": "/plan", "readOnly": True}
    assert volumes(children)["plan"]["configMap"]["name"] == "demo-publish"


# several GPUs and nodes

TWO_NODES = {"resources": {"gpus": 4, "nodes": 2}, "workspace": {"claimName": "team-disk"}}


def test_one_node_with_several_gpus_is_as_any_other_but_for_its_shared_memory():
    one, four = render(resources={"gpus": 1}), render(resources={"gpus": 4})
    assert container(four)["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert volumes(four)["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert set(four) == set(one)
    assert "env" not in container(four) and "subdomain" not in pod_of(four)


def test_several_nodes_are_one_job_whose_pods_find_each_other_by_name():
    children = render(**TWO_NODES)
    assert list(children) == ["ConfigMap", "Service", "Job"]
    job, service = children["Job"]["spec"], children["Service"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    assert service["metadata"]["name"] == pod_of(children)["subdomain"] == "demo-train"
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    rank, address, port = container(children)["env"]
    assert rank == {
        "name": "FINETUNE_NODE_RANK",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}},
    }
    assert address == {"name": "FINETUNE_MASTER_ADDR", "value": "demo-train-0.demo-train"}
    assert port == {"name": "FINETUNE_MASTER_PORT", "value": "29400"}
    assert container(children)["args"] == ["train", "--plan", "/plan/plan.json"]


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.PUBLISH])
def test_the_cpu_stages_of_several_nodes_are_those_of_one(stage):
    several, one = render(stage, **TWO_NODES), render(stage, workspace=TWO_NODES["workspace"])
    assert {kind: child for kind, child in several.items() if kind != "ConfigMap"} == {
        kind: child for kind, child in one.items() if kind != "ConfigMap"
    }


def test_of_several_nodes_each_has_its_retries_and_the_victims_of_a_lost_peer_cost_none():
    job = render(**TWO_NODES, limits={"retries": 5})["Job"]["spec"]
    assert (job["backoffLimitPerIndex"], job["maxFailedIndexes"]) == (5, 0)
    assert "backoffLimit" not in job
    *as_usual, victims = job["podFailurePolicy"]["rules"]
    assert as_usual == render()["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert victims["action"] == "Ignore"
    assert victims["onExitCodes"] == {"containerName": "trainer", "operator": "In", "values": [75]}


# the Job


def test_a_users_error_fails_the_job_at_once_and_a_disruption_costs_nothing():
    job = render(limits={"retries": 5, "activeDeadlineSeconds": 77})["Job"]["spec"]
    user_error, disruption = job["podFailurePolicy"]["rules"]
    assert user_error["action"] == "FailJob"
    assert user_error["onExitCodes"] == {"containerName": "trainer", "operator": "In", "values": [64]}
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert (job["backoffLimit"], job["activeDeadlineSeconds"]) == (5, 77)
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 1, 1)
    assert job["podReplacementPolicy"] == "Failed"
    assert "ttlSecondsAfterFinished" not in job


def test_without_a_deadline_there_is_none():
    assert "activeDeadlineSeconds" not in render()["Job"]["spec"]


@pytest.mark.parametrize("suspended", [True, False])
def test_suspend_is_what_the_caller_says_also_in_a_queue(suspended):
    job = render(suspended=suspended, scheduling={"queueName": "gpus"})["Job"]
    assert (job["spec"]["suspend"], is_suspended_by_us(job)) == (suspended, suspended)


def test_only_training_queues_and_all_stages_run_in_the_same_place():
    scheduling = {
        "queueName": "gpus",
        "workloadPriorityClassName": "urgent",
        "priorityClassName": "high",
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "kind", "operator": "In", "values": ["big"]}]}]
                }
            }
        },
    }
    for stage in Stage:
        children = render(stage, scheduling=scheduling)
        pod = pod_of(children)
        queue = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "urgent"}
        found = queue.items() & children["Job"]["metadata"]["labels"].items()
        assert found == (queue.items() if stage is Stage.TRAIN else set())
        assert {key: pod.get(key) for key in scheduling} == scheduling | {
            "queueName": None,
            "workloadPriorityClassName": None,
        }


# rights


@pytest.mark.parametrize("stage", list(Stage))
def test_pods_meet_the_restricted_pod_security_level(stage):
    pod, trainer = pod_of(render(stage)), container(render(stage))
    inside, around = trainer["securityContext"], pod["securityContext"]
    assert around["runAsNonRoot"] is True
    assert around["runAsUser"] == around["runAsGroup"] == around["fsGroup"] == 65532
    assert around["fsGroupChangePolicy"] == "OnRootMismatch"
    assert around["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inside["allowPrivilegeEscalation"] is False
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert inside["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert trainer["terminationMessagePolicy"] == "File"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert trainer["ports"] == [{"name": "telemetry", "containerPort": 9400}]


def test_the_image_is_pulled_as_the_installation_says():
    where = Settings(
        trainer_image="private/trainer@sha256:1", trainer_pull_policy="Always", trainer_pull_secrets=("a", "b")
    )
    children = render(where=where)
    assert container(children)["image"] == "private/trainer@sha256:1"
    assert container(children)["imagePullPolicy"] == "Always"
    assert pod_of(children)["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
    assert "imagePullSecrets" not in pod_of(render())


# resources


def test_only_training_gets_gpus():
    wanted = {"gpus": 1, "gpuResource": "amd.com/gpu", "requests": {"cpu": 4}, "limits": {"memory": "16Gi"}}
    assert container(render(resources=wanted))["resources"] == {
        "requests": {"cpu": "4"},
        "limits": {"memory": "16Gi", "amd.com/gpu": "1"},
    }
    for stage in (Stage.PREPARE, Stage.PUBLISH):
        assert container(render(stage, resources=wanted))["resources"] == {"requests": {"cpu": "500m", "memory": "1Gi"}}


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_gpus_are_those_of_resources_gpus_whatever_a_map_smuggles_in(gpus):
    smuggled = {"nvidia.com/gpu": 7, "cpu": 1}
    wanted = {
        "gpus": gpus,
        "requests": smuggled,
        "limits": smuggled,
        "prepare": {"requests": smuggled, "limits": smuggled},
    }
    train = container(render(resources=wanted))["resources"]
    assert train["requests"] == {"cpu": "1"}
    assert train["limits"] == {"cpu": "1"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    assert "nvidia.com/gpu" not in json.dumps(container(render(Stage.PREPARE, resources=wanted))["resources"])


def test_a_train_pod_of_a_spec_without_resources_asks_for_none():
    assert container(render())["resources"] == {}


def test_a_small_limit_of_the_cpu_stages_is_not_below_the_usual_request():
    wanted = {"prepare": {"limits": {"memory": "256Mi"}}}
    for stage in (Stage.PREPARE, Stage.PUBLISH):
        assert container(render(stage, resources=wanted))["resources"] == {
            "requests": {"cpu": "500m"},
            "limits": {"memory": "256Mi"},
        }


# storage


EVERYTHING = {
    "model": {"uri": "pvc://models/llama", "secretRef": {"name": "hub"}},
    "dataset": {
        "sources": [
            {"uri": "pvc://models/rows.jsonl", "secretRef": {"name": "aws"}},
            {"uri": "configmap://rows/a.csv"},
            {"uri": "configmap://rows/b.csv"},
            {"uri": "configmap://rows/a.csv"},
        ],
        "validation": {"sources": [{"uri": "s3://bucket/v.csv", "secretRef": {"name": "aws"}}]},
        "test": {"sources": [{"uri": "https://host/t.csv", "secretRef": {"name": "web"}}]},
    },
    "output": {"uri": "pvc://results/demo", "secretRef": {"name": "push"}},
}


def test_a_volume_of_usual_size_and_one_that_was_asked_for():
    usual = render(Stage.PREPARE)["PersistentVolumeClaim"]["spec"]
    assert usual == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "20Gi"}}}
    wanted = {"size": "1Ti", "storageClassName": "fast", "accessMode": "ReadWriteMany"}
    assert render(Stage.PREPARE, workspace=wanted)["PersistentVolumeClaim"]["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Ti"}},
        "storageClassName": "fast",
    }


def test_training_sees_its_workspace_and_its_plan_and_no_source_and_no_secret():
    children = render(**EVERYTHING)
    assert set(volumes(children)) == {"plan", "tmp", "workspace", "shm"}
    assert volumes(children)["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert mounts(children)["/dev/shm"]["name"] == "shm"
    assert "readOnly" not in mounts(children)["/workspace"]
    assert "env" not in container(children)
    assert "envFrom" not in container(children)


def test_prepare_reads_each_source_from_where_its_plan_says_and_can_change_none():
    children = render(Stage.PREPARE, **EVERYTHING)
    assert set(mounts(children)) == {
        "/plan", "/tmp", "/workspace", "/sources/pvc/models", "/sources/configmap/rows",
        "/secrets/hub", "/secrets/aws", "/secrets/web",
    }  # fmt: skip
    for path, mount in mounts(children).items():
        assert mount.get("readOnly", False) == path.startswith(("/plan", "/sources", "/secrets"))
    found = volumes(children)
    claim = found[mounts(children)["/sources/pvc/models"]["name"]]
    assert claim["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    rows = found[mounts(children)["/sources/configmap/rows"]["name"]]["configMap"]
    assert rows == {
        "name": "rows",
        "items": [{"key": "a.csv", "path": "a.csv"}, {"key": "b.csv", "path": "b.csv"}],
    }
    secret = found[mounts(children)["/secrets/aws"]["name"]]["secret"]
    assert secret == {"secretName": "aws", "defaultMode": 0o440}


def test_publish_may_write_its_target_and_has_no_key_but_its_own():
    children = render(Stage.PUBLISH, **EVERYTHING)
    assert set(mounts(children)) == {"/plan", "/tmp", "/workspace", "/sources/pvc/results", "/secrets/push"}
    target = mounts(children)["/sources/pvc/results"]
    assert "readOnly" not in target
    assert volumes(children)[target["name"]]["persistentVolumeClaim"] == {"claimName": "results"}


def test_a_shared_claim_is_whole_for_prepare_alone_and_the_others_get_the_jobs_folder():
    workspace = {"claimName": "team-disk"}
    folder = "/workspace/demo-0f3a9c52"
    prepare = render(Stage.PREPARE, workspace=workspace)
    assert "PersistentVolumeClaim" not in prepare
    assert mounts(prepare)["/workspace"] == {"name": "workspace", "mountPath": "/workspace"}
    for stage in (Stage.TRAIN, Stage.PUBLISH):
        assert mounts(render(stage, workspace=workspace))[folder] == {
            "name": "workspace",
            "mountPath": folder,
            "subPath": "demo-0f3a9c52",
        }
    assert {plan_of(render(stage, workspace=workspace)).workspace for stage in Stage} == {folder}


@pytest.mark.parametrize("workspace", [{}, {"claimName": "demo-workspace"}])
def test_a_claim_that_is_workspace_and_source_and_target_is_one_volume(workspace):
    uri = "pvc://demo-workspace/file.jsonl"
    for stage in (Stage.PREPARE, Stage.PUBLISH):
        children = render(stage, workspace=workspace, dataset={"sources": [{"uri": uri}]}, output={"uri": uri})
        claims = [volume for volume in volumes(children).values() if "persistentVolumeClaim" in volume]
        assert [claim["persistentVolumeClaim"] for claim in claims] == [{"claimName": "demo-workspace"}]
        source = mounts(children)["/sources/pvc/demo-workspace"]
        assert source["name"] == "workspace"
        assert source.get("readOnly", False) == (stage is Stage.PREPARE)


# wild specs

objects = st.sampled_from(["a", "rows", "demo-workspace", "v1.2.3", "x" * 253, "a." * 120 + "b"])
pieces = st.text(
    st.characters(exclude_categories=("Z", "C")) | st.sampled_from("./%\\:"),
    min_size=1,
    max_size=40,
)
uris = (
    st.builds("pvc://{}/{}".format, objects, pieces)
    | st.builds("configmap://{}/{}".format, objects, st.from_regex(r"[-._a-zA-Z0-9]{1,40}", fullmatch=True))
    | st.builds("{}://{}".format, st.sampled_from(["s3", "hf", "gs", "az", "https"]), pieces)
)
locations = st.builds(
    lambda uri, secret: {"uri": uri} | ({"secretRef": {"name": secret}} if secret else {}),
    uris,
    st.none() | objects,
)
specs = st.fixed_dictionaries(
    {
        "model": locations,
        "dataset": st.fixed_dictionaries(
            {"sources": st.lists(locations, min_size=1, max_size=6)},
            optional={"test": st.fixed_dictionaries({"sources": st.lists(locations, min_size=1, max_size=3)})},
        ),
    },
    optional={"output": locations, "workspace": st.builds(lambda claim: {"claimName": claim}, objects)},
)
names = st.from_regex(rf"[a-z]([-a-z0-9]{{0,{NAME_LENGTH - 2}}}[a-z0-9])?", fullmatch=True) | st.just("x" * NAME_LENGTH)


@settings(max_examples=60, deadline=None)
@given(name=names, spec=specs)
def test_whatever_is_asked_for_the_manifests_are_well_formed(name, spec):
    for stage in Stage:
        children = render(stage, name, **spec)
        pod, trainer = pod_of(children), container(children)
        assert json.loads(json.dumps(children)) == children
        metadata = [child["metadata"] for child in children.values()] + [
            children["Job"]["spec"]["template"]["metadata"]
        ]
        assert all(len(value) <= 63 for value in chain.from_iterable(m["labels"].values() for m in metadata))
        assert len(children["Job"]["metadata"]["name"] + "-63") <= 63  # the pods' host name
        assert all(HASH_ANNOTATION in child["metadata"]["annotations"] for child in children.values())
        declared = [volume["name"] for volume in pod["volumes"]]
        assert len(set(declared)) == len(declared)
        assert all(re.fullmatch(DNS_LABEL, volume) and len(volume) <= 63 for volume in declared)
        assert set(declared) == {mount["name"] for mount in trainer["volumeMounts"]}
        paths = [mount["mountPath"] for mount in trainer["volumeMounts"]]
        assert len(set(paths)) == len(paths)
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert len(set(claims)) == len(claims)
        assert_plan_is_within_the_mounts(plan_of(children), paths)
        if stage is Stage.TRAIN:
            assert set(declared) == {"plan", "tmp", "workspace", "shm"}


def assert_plan_is_within_the_mounts(plan: Plan, paths: list[str]) -> None:
    located = [plan.model.location, plan.output.location, *(source.location for source in plan.dataset.sources)]
    for location in filter(None, located):
        for path in filter(None, (location.path, location.secret_dir)):
            assert any(
                f"{path}/".startswith(f"{mount}/") for mount in paths if mount.startswith(("/sources", "/secrets"))
            )


@settings(max_examples=20, deadline=None)
@given(spec=specs)
def test_the_same_spec_gives_the_same_manifests(spec):
    for stage in Stage:
        assert render(stage, **spec) == render(stage, **spec)
