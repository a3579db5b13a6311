"""A cluster that lives by itself in virtual time: Job controller, garbage collector and kubelet on a played API server.

Each of them reacts late, by a drawn time, and to what is there then. Faults are `kill_trainer`, `delete`, `drain`, and
those of the API server.
"""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

from finetune_api.constants import JOB_LABEL, ExitCode, Stage
from finetune_api.progress import Progress, Result
from finetune_operator.observed import Manifest, condition_of, has_ended, is_owned_by, stage_of, terminated

from tests.played_api_server import Observer, PlayedApiServer
from tests.played_trainer import Trainer, Workspace
from tests.virtual_time import Clock


class PlayedCluster(PlayedApiServer):
    def __init__(self, observer: Observer) -> None:
        super().__init__(observer)
        self.workspaces: dict[str, Workspace] = {}
        """By the claim's uid."""
        self.trainers: dict[str, Trainer] = {}
        """By the pod's uid."""
        self._due: set[str] = set()  # Jobs that the Job controller looks at in a moment
        self._judged: dict[str, set[str]] = {}  # by a Job's uid: its pods whose end is counted
        self._names = 0

    def put(self, path: str, body: Manifest) -> Manifest:
        is_new = path not in self.objects
        new = super().put(path, body)
        if is_new:
            self._later(self._collect_orphan, path, 0.1, 2.0)
        return new

    def remove(self, path: str) -> Manifest:
        old = super().remove(path)
        self._later(self._collect_garbage, old["metadata"]["uid"], 0.1, 2.0)
        return old

    def _changed(self, change: str, path: str, old: Manifest | None, new: Manifest | None, told: Any = None) -> None:
        super()._changed(change, path, old, new, told)
        if "/jobs/" in path and new is not None and new["spec"]["template"]:
            self._look_at(path)
        if "/pods/" in path:
            for job_path, _ in self._owners_of(old or new or {}):
                self._look_at(job_path)

    def _delete(self, path: str, body: Manifest) -> Manifest:
        """As the real one: a pod may take its time, a Job in the foreground goes after its pods."""
        found = self.objects.get(path)
        is_meant = found is not None and found["metadata"]["uid"] == body["preconditions"]["uid"]
        if found is not None and is_meant and "/jobs/" in path and body["propagationPolicy"] == "Foreground":
            return self.put(path, {**found, "metadata": {**found["metadata"], "deletionTimestamp": self.now()}})
        return super()._delete(path, {**body, "propagationPolicy": "Background"})

    def owned_by(self, uid: str) -> list[tuple[str, Manifest]]:
        return [
            (path, body) for path, body in list(self.objects.items()) if "metadata" in body and is_owned_by(body, uid)
        ]

    def pods(self, *stages: Stage) -> Iterator[tuple[str, Manifest]]:
        for path, body in list(self.objects.items()):
            if "/pods/" in path and (not stages or stage_of(body) in stages):
                yield path, body

    # --- garbage collector

    def _collect_garbage(self, owner: str) -> None:
        for path, _ in self.owned_by(owner):
            self.delete(path)

    def _collect_orphan(self, path: str) -> None:
        """What was made after its owner had gone goes too."""
        owners = {owner["uid"] for owner in self.objects.get(path, {}).get("metadata", {}).get("ownerReferences") or ()}
        if owners and not any(body.get("metadata", {}).get("uid") in owners for body in self.objects.values()):
            self.delete(path)

    def delete(self, path: str, *, force: bool = False) -> None:
        """By kubectl or a controller. `force`: a pod's process is killed and nobody is told how it ended."""
        body = self.objects.get(path)
        if body is None:
            return
        trainer = self.trainers.get(body["metadata"]["uid"])
        if "/persistentvolumeclaims/" in path and any(_mounts(pod, path) for _, pod in self.pods()):
            self._later(self.delete, path, 1.0, 3.0)  # its protection: not while a pod uses it
        elif "/pods/" not in path or trainer is None or force:
            if trainer is not None:
                trainer.task.cancel()
            for job_path, _ in self._owners_of(body):  # its finalizer: it goes after its Job has counted it
                self._judge(job_path)
            self.remove(path)
        elif not trainer.asked_to_stop:
            trainer.asked_to_stop = True
            self.put(path, {**body, "metadata": {**body["metadata"], "deletionTimestamp": self.now()}})

    # --- Job controller

    def _look_at(self, path: str) -> None:
        if path not in self._due:
            self._due.add(path)
            self._later(self._sync, path, 0.01, 0.3)

    def _owners_of(self, pod: Manifest) -> list[tuple[str, Manifest]]:
        owners = {owner["uid"] for owner in pod["metadata"].get("ownerReferences") or ()}
        return [(p, job) for p, job in self.objects.items() if "/jobs/" in p and job["metadata"]["uid"] in owners]

    def _sync(self, path: str) -> None:
        self._due.discard(path)
        job = self.objects.get(path)
        if job is None:
            return
        pods = self.owned_by(job["metadata"]["uid"])
        alive = [(pod_path, pod) for pod_path, pod in pods if _is_alive(pod)]
        if "deletionTimestamp" in job["metadata"]:
            for pod_path, _ in pods:
                self.delete(pod_path)
            if not self.owned_by(job["metadata"]["uid"]):
                self.remove(path)
            return
        self._judge(path)
        job = self.objects[path]
        if has_ended(job) or job["spec"].get("suspend"):
            for pod_path, _ in alive:
                self.delete(pod_path)
        elif not alive:
            self._make_pod(path, job)

    def _judge(self, path: str) -> None:
        """Takes the ends of the Job's pods into its status."""
        job = self.objects[path]
        uid, status = job["metadata"]["uid"], dict(job.get("status") or {})
        judged = self._judged.setdefault(uid, set())
        verdict = None
        for _, pod in self.owned_by(uid):
            if _is_alive(pod) or pod["metadata"]["uid"] in judged:
                continue
            judged.add(pod["metadata"]["uid"])
            code = (terminated(pod) or {}).get("exitCode")
            if code == ExitCode.DONE:
                verdict = {"type": "Complete", "status": "True"}
            elif code == ExitCode.USER_ERROR:
                verdict = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}
            elif condition_of(pod, "DisruptionTarget") is None and not job["spec"].get("suspend"):
                status["failed"] = status.get("failed", 0) + 1
        if status.get("failed", 0) > job["spec"]["backoffLimit"] and verdict is None:
            verdict = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
        if verdict is not None and not has_ended(job):
            status |= {"conditions": [verdict], "completionTime": self.now()}
        self.put(path, {**job, "status": status})

    def _make_pod(self, path: str, job: Manifest) -> None:
        self._names += 1
        template = job["spec"]["template"]
        name = f"{job['metadata']['name']}-0-{random.randrange(16**5):05x}"
        owner = {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
        metadata = {"name": name, "labels": template["metadata"]["labels"], "ownerReferences": [owner]}
        pod_path = f"{path.split('/apis/batch/v1')[1].rsplit('/jobs/', 1)[0]}/pods/{name}"
        body = {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}}
        pod = self.put(f"/api/v1{pod_path}", body)
        self._later(self._start, (f"/api/v1{pod_path}", pod["metadata"]["uid"]), 0.2, 3.0)

    # --- kubelet

    def _start(self, which: tuple[str, str]) -> None:
        path, uid = which
        pod = self.objects.get(path)
        if pod is None or pod["metadata"]["uid"] != uid:
            return
        missing = self._missing(path, pod)
        if missing:
            self._complain(path, pod, missing)
            self._later(self._start, which, 2.0, 4.0)
            return
        self._names += 1
        running = {"state": {"running": {"startedAt": self.now()}}}
        status = {
            "phase": "Running",
            "podIP": f"10.0.{self._names // 250}.{self._names % 250}",
            "containerStatuses": [running],
        }
        pod = self.put(path, {**pod, "status": status})
        stage = Stage(str(stage_of(pod)))
        progress = Progress(stage=stage, activity="Starting", fraction=0.0, updated_at=Clock.time())
        self.trainers[uid] = Trainer(asyncio.create_task(self._run(path, uid, stage)), progress)

    def _missing(self, path: str, pod: Manifest) -> str | None:
        namespace = path.rsplit("/pods/", 1)[0]
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume and f"{namespace}/configmaps/{volume['configMap']['name']}" not in self.objects:
                return f'configmap "{volume["configMap"]["name"]}"'
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if claim and f"{namespace}/persistentvolumeclaims/{claim}" not in self.objects:
                return f'persistentvolumeclaim "{claim}"'
        return None

    def _complain(self, path: str, pod: Manifest, missing: str) -> None:
        """Of a claim the scheduler does, in the pod's status, of a ConfigMap the kubelet, by an Event."""
        if missing.startswith("persistent"):
            message = f"0/1 nodes are available: {missing} not found."
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            self.put(path, {**pod, "status": {"phase": "Pending", "conditions": [condition]}})
            return
        message = f'MountVolume.SetUp failed for volume "plan" : {missing} not found'
        about = {"uid": pod["metadata"]["uid"], "name": pod["metadata"]["name"]}
        event = {"involvedObject": about, "reason": "FailedMount", "message": message, "lastTimestamp": self.now()}
        self.put(path.replace("/pods/", "/events/"), event)

    def kill_trainer(self, uid: str, code: int, said: Result | None = None) -> None:
        """The container ends with this exit code."""
        trainer = self.trainers.get(uid)
        if trainer is not None:
            trainer.task.cancel()
            path = next(path for path, pod in self.pods() if pod["metadata"]["uid"] == uid)
            self._end(path, uid, code, said)

    def drain(self, path: str) -> None:
        pod = self.objects[path]
        disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        self.put(path, {**pod, "status": {**pod["status"], "conditions": [disrupted]}})
        self.delete(path)

    def _end(self, path: str, uid: str, code: int, said: Result | None) -> None:
        self.trainers.pop(uid, None)
        for workspace in self.workspaces.values():
            if workspace.writer == uid:
                workspace.writer = None
        pod = self.objects.get(path)
        if pod is None or pod["metadata"]["uid"] != uid:
            return
        end = {"exitCode": code, "finishedAt": self.now(), "message": said.to_termination_message() if said else ""}
        phase = "Failed" if code else "Succeeded"
        status = {**pod["status"], "phase": phase, "containerStatuses": [{"state": {"terminated": end}}]}
        self.put(path, {**pod, "status": status})
        if "deletionTimestamp" in pod["metadata"]:
            self.delete(path)

    def workspace_of(self, pod: Manifest) -> Workspace:
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["labels"][JOB_LABEL]
        claim = self.objects[f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}-workspace"]
        return self.workspaces.setdefault(claim["metadata"]["uid"], Workspace(name))

    async def _run(self, path: str, uid: str, stage: Stage) -> None:
        workspace = self.workspace_of(self.objects[path])
        assert workspace.writer is None, f"two pods write to the workspace of {path}"
        workspace.writer = uid
        try:
            code, said = await self.trainers[uid].work(stage, workspace)
        except asyncio.CancelledError:
            self.trainers.pop(uid, None)
            if workspace.writer == uid:
                workspace.writer = None
            raise
        self._end(path, uid, code, said)

    def progress_at(self, ip: str) -> Progress | None:
        """What a pod answers."""
        for _, pod in self.pods():
            if pod["status"].get("podIP") == ip and pod["metadata"]["uid"] in self.trainers:
                return self.trainers[pod["metadata"]["uid"]].progress
        return None


def _mounts(pod: Manifest, claim_path: str) -> bool:
    namespace, name = claim_path.split("/namespaces/")[1].split("/persistentvolumeclaims/")
    claims = [(volume.get("persistentVolumeClaim") or {}).get("claimName") for volume in pod["spec"]["volumes"]]
    return _is_alive(pod) and pod["metadata"]["namespace"] == namespace and name in claims


def _is_alive(pod: Manifest) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Pending", "Running")
