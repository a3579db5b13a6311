"""The folder of a run, and where a job of this machine finds its files."""

import time
from pathlib import Path

import pytest
from finetune_api.constants import Stage
from finetune_api.kubernetes import LocalReference
from finetune_api.rules import parse_job, parse_spec
from finetune_operator import local_job
from finetune_operator.local import LocalLayout
from finetune_operator.observed import Manifest, Resource
from finetune_operator.run_folder import RunError, admit

from tests import fake_trainer
from tests.local_world import World, manifest


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(local_job, "FIRST_BACK_OFF", 0.05)
    return World(tmp_path)


class TestAdmission:
    def admit(self, world: World, fresh: bool = False, **changes: object) -> Manifest:
        return admit(world.run, parse_job(manifest(**changes)), time.time(), fresh)

    def write(self, world: World, status: Manifest) -> None:
        document = world.run.read("job.json")
        assert document is not None
        world.run.write("job.json", {**document, "status": status})

    def failed(self, code: int | None, stage: str | None = "train") -> Manifest:
        """The status of a failed job whose data were prepared."""
        failure = {"reason": "StageFailed", "message": "it broke", "stage": stage, "exitCode": code}
        return {
            "phase": "Failed",
            "message": "it broke",
            "data": fake_trainer.success(Stage.PREPARE).prepare.data.to_dict(),
            "completionTime": "2026-01-01T00:00:00Z",
            "failure": {key: value for key, value in failure.items() if value is not None},
        }

    def test_a_new_run_gets_what_an_api_server_gives(self, world):
        metadata = self.admit(world)["metadata"]
        assert (metadata["name"], metadata["namespace"], metadata["generation"]) == ("demo", "default", 1)
        assert metadata["uid"]
        assert metadata["creationTimestamp"]

    def test_the_same_spec_goes_on(self, world):
        assert self.admit(world) == self.admit(world)

    def test_limits_may_change(self, world):
        first, second = self.admit(world), self.admit(world, **{"limits.retries": 7})
        assert second["metadata"]["uid"] == first["metadata"]["uid"]
        assert second["metadata"]["generation"] == 2
        assert second["spec"]["limits"]["retries"] == 7

    def test_another_spec_is_refused_by_the_names_of_its_fields(self, world):
        self.admit(world)
        with pytest.raises(RunError, match=r"changed: training\).*--fresh"):
            self.admit(world, **{"training.epochs": 9})

    def test_fresh_discards_the_run_and_nothing_else(self, world):
        first = self.admit(world)
        (world.run.path / "workspace").mkdir()
        (world.run.path / "mine.txt").touch()
        second = self.admit(world, fresh=True, **{"training.epochs": 9})
        assert second["metadata"]["uid"] != first["metadata"]["uid"]
        assert not (world.run.path / "workspace").exists()
        assert (world.run.path / "mine.txt").exists()

    @pytest.mark.parametrize("fresh", [True, False])
    def test_what_no_run_made_is_never_removed(self, world, fresh):
        mine = world.run.path / "logs" / "mine.txt"
        mine.parent.mkdir(parents=True)
        mine.touch()
        with pytest.raises(RunError, match=r"run/logs is there and was not made by a run; .*--output"):
            self.admit(world, fresh=fresh)
        assert mine.exists()

    def test_a_failed_stage_is_tried_again_on_what_is_done(self, world):
        first = self.admit(world)
        self.write(world, self.failed(1))
        failed = {"conditions": [{"type": "Failed", "status": "True"}]}
        children = {"prepare": {"job": {"status": {}}, "pods": []}, "train": {"job": {"status": failed}, "pods": []}}
        world.run.write("children.json", children)
        again = self.admit(world)
        assert again["metadata"]["uid"] == first["metadata"]["uid"]
        assert set(again["status"]) == {"data"}
        assert set(world.run.read("children.json")) == {"prepare"}

    @pytest.mark.parametrize("failure", [{"code": 64}, {"code": None, "stage": None}])
    def test_what_the_user_had_to_mend_starts_from_nothing(self, world, failure):
        first = self.admit(world)
        self.write(world, self.failed(**failure))
        (world.run.path / "workspace").mkdir()
        again = self.admit(world)
        assert again["metadata"]["uid"] != first["metadata"]["uid"]
        assert again["status"] == {}
        assert not (world.run.path / "workspace").exists()

    def test_after_a_failure_the_spec_may_change(self, world):
        self.admit(world)
        self.write(world, self.failed(1))
        assert self.admit(world, **{"training.epochs": 9})["status"] == {}

    def test_a_damaged_folder_says_what_to_do(self, world):
        self.admit(world)
        (world.run.path / "job.json").write_text("{")
        with pytest.raises(RunError, match=r"job.json is damaged.*--fresh"):
            self.admit(world)
        assert self.admit(world, fresh=True)["status"] == {}


class TestLayout:
    def test_files_are_relative_to_the_manifest(self, tmp_path):
        layout = LocalLayout(tmp_path / "run", tmp_path / "jobs")
        assert layout.locate("file://data/a.jsonl", None).path == str(tmp_path / "jobs" / "data" / "a.jsonl")
        assert layout.locate("file://../models/m", None).path == str(tmp_path / "models" / "m")
        assert layout.locate("file:///etc/hosts", None).path == "/etc/hosts"

    def test_prepared_data_is_kept_for_the_same_run_or_for_all_on_a_claim(self, tmp_path):
        (tmp_path / "disk").mkdir()
        layout = LocalLayout(tmp_path / "run", tmp_path, volumes={"team": tmp_path / "disk"})
        assert layout.cache(parse_spec(manifest()["spec"])) == str(tmp_path / "run" / ".prepared")
        shared = parse_spec(manifest(**{"workspace.claimName": "team"})["spec"])
        assert layout.cache(shared) == str(tmp_path / "disk" / ".prepared")

    def test_a_folder_stands_for_a_claim_or_config_map(self, tmp_path):
        layout = LocalLayout(tmp_path, tmp_path, volumes={"store": tmp_path / "s", "texts": tmp_path / "t"})
        assert layout.locate("pvc://store/a/b.csv", None).path == str(tmp_path / "s" / "a" / "b.csv")
        assert layout.locate("configmap://texts/c.csv", None).path == str(tmp_path / "t" / "c.csv")

    @pytest.mark.parametrize("uri", ["pvc://store/a.csv", "configmap://store/a.csv"])
    def test_without_one_the_option_is_named(self, tmp_path, uri):
        with pytest.raises(RunError, match=f"{uri} is only in a cluster.*--volume store=FOLDER"):
            LocalLayout(tmp_path, tmp_path).locate(uri, None)

    def test_a_secret_is_a_folder_or_the_environments(self, tmp_path):
        layout = LocalLayout(tmp_path, tmp_path, secrets={"cloud": tmp_path / "keys"})
        location = layout.locate("s3://bucket/a.csv", LocalReference(name="cloud"))
        assert (location.path, location.secret_dir) == (None, str(tmp_path / "keys"))
        assert layout.locate("s3://bucket/a.csv", LocalReference(name="other")).secret_dir is None

    def test_every_place_without_one_is_found(self, tmp_path):
        changes = {
            "model.uri": "pvc://models/m",
            "model.adapter": {"uri": "pvc://models/a"},
            "dataset.sources": [{"uri": "file://a.csv"}, {"uri": "configmap://texts/a"}],
            "dataset.validation": {"sources": [{"uri": "pvc://data/v"}]},
            "dataset.test": {"sources": [{"uri": "pvc://data/t"}]},
            "dataset.review.decisions": [{"uri": "pvc://data/r"}],
            "output.uri": "pvc://out/o",
            "resources.nodes": 2,
            "workspace.claimName": "team",
        }
        spec = parse_spec(manifest(**changes)["spec"])
        found = LocalLayout(tmp_path, tmp_path).findings(spec)
        assert str(found[0]).startswith("spec.resources.nodes: found 2: `finetune run` has this machine only")
        assert [finding.field for finding in found] == [
            "spec.resources.nodes",
            "spec.model.uri",
            "spec.model.adapter.uri",
            "spec.dataset.sources[1].uri",
            "spec.dataset.validation.sources[0].uri",
            "spec.dataset.test.sources[0].uri",
            "spec.dataset.review.decisions[0].uri",
            "spec.output.uri",
        ]

    def test_a_mapped_workspace_claim_has_a_folder_per_job(self, tmp_path):
        resource = Resource.read({"metadata": {"name": "demo", "uid": "12345678-9"}, "spec": {}})
        spec = parse_spec(manifest(**{"workspace.claimName": "store"})["spec"])
        mapped = LocalLayout(tmp_path / "run", tmp_path, volumes={"store": tmp_path / "s"})
        assert mapped.workspace(resource, spec) == str(tmp_path / "s" / "demo-12345678")
        assert LocalLayout(tmp_path / "run", tmp_path).workspace(resource, spec) == str(tmp_path / "run" / "workspace")
