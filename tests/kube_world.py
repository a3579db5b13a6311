"""`KubeCluster` before a fake API server that has one FineTuneJob."""

from contextlib import asynccontextmanager

from finetune_api.constants import HASH_ANNOTATION, JOB_LABEL, STAGE_LABEL, Stage
from finetune_api.progress import Progress
from finetune_operator.event_recorder import EventRecorder
from finetune_operator.kube import KubeCluster
from finetune_operator.observed import Key
from finetune_operator.store import FINE_TUNE_JOBS, JOBS, PODS, Store

from tests.fake_kubernetes import fake_kubernetes

KEY = Key("team", "demo")
NAMESPACE = "/namespaces/team"
RESOURCE = f"/apis/finetune-operator.io/v1alpha1{NAMESPACE}/finetunejobs/demo"
JOB = f"/apis/batch/v1{NAMESPACE}/jobs/demo-train"
GUARD = f"/apis/networking.k8s.io/v1{NAMESPACE}/networkpolicies/guard"
POLICY = f"/apis/networking.k8s.io/v1{NAMESPACE}/networkpolicies/demo-train"
CLAIM = f"/api/v1{NAMESPACE}/persistentvolumeclaims/demo-workspace"


class World:
    """A FineTuneJob on the fake server, known to the store, and the adapter."""

    def __init__(self, fake, api) -> None:
        self.fake, self.api = fake, api
        self.store = Store()
        self.seconds: float | Exception = 10.0
        self.progress: dict[str, Progress] = {}
        self.recorder = EventRecorder(api, self._seconds_to_write)
        self.cluster = KubeCluster(api, self.store, self._seconds_to_write, self.progress.get, self.recorder.record)
        self.put(FINE_TUNE_JOBS, RESOURCE, {"spec": {"suspend": False}})

    def _seconds_to_write(self) -> float:
        if isinstance(self.seconds, Exception):
            raise self.seconds
        return self.seconds

    def put(self, kind, path, body):
        body = self.fake.put(path, body)
        self.store.put(kind, body)
        return body

    @property
    def uid(self) -> str:
        return self.fake.objects[RESOURCE]["metadata"]["uid"]

    async def resource(self):
        found = await self.cluster.observe(KEY)
        assert found
        return found[0]

    async def observed(self):
        found = await self.cluster.observe(KEY)
        assert found
        return found[1]

    def owner(self, uid=None):
        return [{"kind": "FineTuneJob", "name": "demo", "uid": uid or self.uid, "controller": True}]

    def child(self, kind="Job", name="demo-train", stage=Stage.TRAIN, content="1", **fields):
        version = {"Job": "batch/v1", "NetworkPolicy": "networking.k8s.io/v1"}.get(kind, "v1")
        metadata = {
            "name": name,
            "namespace": "team",
            "labels": {JOB_LABEL: "demo", STAGE_LABEL: str(stage)},
            "annotations": {HASH_ANNOTATION: content},
            "ownerReferences": self.owner(),
        }
        return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": {"suspend": False}, **fields}

    def guard(self, **fields):
        """A policy for all jobs of the namespace."""
        policy = self.child("NetworkPolicy", name="guard", **fields)
        del policy["metadata"]["ownerReferences"]
        policy["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "finetune-operator"}
        return policy

    def job(self, stage=Stage.TRAIN):
        return self.put(
            JOBS, f"/apis/batch/v1{NAMESPACE}/jobs/demo-{stage}", self.child(name=f"demo-{stage}", stage=stage)
        )

    def pod(self, job, name, created="2026-01-01T00:00:00Z", phase="Running", index="0", **pod_status):
        metadata = {
            "creationTimestamp": created,
            "labels": {JOB_LABEL: "demo", STAGE_LABEL: job["metadata"]["labels"][STAGE_LABEL]},
            "annotations": {"batch.kubernetes.io/job-completion-index": index},
            "ownerReferences": [{"kind": "Job", "uid": job["metadata"]["uid"]}],
        }
        return self.put(
            PODS, f"/api/v1{NAMESPACE}/pods/{name}", {"metadata": metadata, "status": {"phase": phase, **pod_status}}
        )


@asynccontextmanager
async def kube_world():
    async with fake_kubernetes() as (fake, api):
        yield World(fake, api)
