"""The plan: what is chosen for a user who says little, what is kept of one who says much, where things lie in a pod."""

import re
from pathlib import PurePosixPath

import pytest
from finetune_api.constants import Stage
from finetune_api.plan import Location, Plan
from finetune_api.progress import Progress, TrainResult
from finetune_api.rules import parse_spec
from finetune_api.spec import FineTuneJobSpec, HeadFirst, LoraSpec, TrainingSpec
from finetune_api.status import DataStatus, FineTuneJobStatus, ModelStatus
from finetune_operator.layout import PodLayout, storage_used
from finetune_operator.observed import Key, Resource
from finetune_operator.plans import build_plan
from finetune_operator.resolved import resolved_status
from hypothesis import given
from hypothesis import strategies as st

UID = "0f3a9c52-1111-2222-3333-444455556666"
LAYOUT = PodLayout()


def make_spec(**changes) -> FineTuneJobSpec:
    return parse_spec(
        {
            "task": "Classification",
            "model": {"uri": "hf://owner/name"},
            "dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}]},
        }
        | changes
    )


def make_resource(prepared: bool = False, **data) -> Resource:
    found = FineTuneJobStatus()
    if prepared:
        counts = {
            "rows_read": 1100,
            "rows_kept": 1100,
            "rows_rejected": 0,
            "train_rows": 1000,
            "validation_rows": 100,
            "test_rows": 0,
            "tokens": 30_000,
            "supervised_tokens": 1000,
            "truncated_rows": 0,
            "max_length": 128,
            "fingerprint": "f",
        }
        model = ModelStatus(
            architecture="Bert", parameters=22_700_000, layers=6, hidden_size=384, vocabulary_size=30522
        )
        found = FineTuneJobStatus(data=DataStatus.model_validate(counts | data), model=model)
    return Resource(Key("team", "demo"), UID, 1, False, {}, found)


def make_plan(stage: Stage = Stage.PREPARE, prepared: bool = False, **changes) -> Plan:
    return build_plan(make_resource(prepared), make_spec(**changes), stage, LAYOUT)


def test_a_spec_of_three_lines_gets_what_the_descriptions_promise():
    plan = make_plan()
    assert (plan.training.epochs, plan.training.max_steps) == (3.0, None)
    assert (plan.training.batch_sequences, plan.training.batch_tokens) == (32, None)
    assert plan.training.max_length == 512
    assert plan.training.precision is None
    assert (plan.lora.rank, plan.lora.alpha, plan.lora.dropout, plan.lora.target_modules) == (16, 32, 0.05, None)
    assert plan.dataset.validation.fraction == 0.1
    assert plan.dataset.test is None
    assert plan.evaluation.metrics == ["macroF1", "accuracy", "loss"]
    assert plan.output.format == "Adapter"
    assert plan.output.location is None
    generation = make_plan(task="Generation")
    assert (generation.training.batch_sequences, generation.training.max_length) == (16, 2048)
    assert generation.evaluation.metrics == ["loss", "perplexity"]


@pytest.mark.parametrize(
    ("model", "field", "promise"),
    [
        (TrainingSpec, "epochs", "Left out: 3."),
        (TrainingSpec, "batch_size", "32 sequences (Classification) or 16 (Generation)"),
        (TrainingSpec, "max_length", "at most 512 (Classification) or 2048 (Generation)"),
        (TrainingSpec, "checkpoint_steps", "a twentieth of the run"),
        (TrainingSpec, "evaluation_steps", "once per epoch"),
        (HeadFirst, "learning_rate", "Left out: 0.001."),
        (LoraSpec, "rank", "Left out: 16."),
        (LoraSpec, "alpha", "twice the rank, with RsLoRA 8"),
        (LoraSpec, "dropout", "Left out: 0.05."),
    ],
)
def test_the_defaults_asserted_here_are_those_that_kubectl_explain_shows(model, field, promise):
    assert promise in model.model_fields[field].description


@pytest.mark.parametrize(
    ("lora", "alpha", "shown"),
    [
        ({"variant": "DoRA", "rank": 4}, 8, "DoRA r=4 alpha=8"),
        ({"variant": "RsLoRA"}, 8, "RsLoRA r=16 alpha=8"),
        ({"variant": "RsLoRA", "rank": 64}, 8, "RsLoRA r=64 alpha=8"),
        ({"variant": "RsLoRA", "alpha": 32}, 32, "RsLoRA r=16 alpha=32"),
    ],
)
def test_the_variant_of_lora_is_shown_and_has_its_own_usual_alpha(lora, alpha, shown):
    plan = make_plan(method={"lora": lora})
    assert (plan.lora.variant, plan.lora.alpha) == (lora["variant"], alpha)
    assert resolved_status(plan, None, None).method == shown


@pytest.mark.parametrize(("method", "rate"), [("LoRA", 5e-6), ("Full", 5e-7)])
def test_preference_tuning_has_its_own_learning_rate_and_metrics_and_is_shown(method, rate):
    plan = make_plan(task="Generation", method={"type": method, "dpo": {}})
    assert (plan.dpo.beta, plan.training.learning_rate) == (0.1, rate)
    assert plan.evaluation.metrics == ["rewardAccuracy", "loss"]
    assert resolved_status(plan, None, None).method.endswith(", DPO beta=0.1")
    assert make_plan(task="Generation").dpo is None


def test_a_micro_batch_has_room_for_both_answers_of_a_pair():
    most = [
        make_plan(Stage.TRAIN, True, task="Generation", method=method, training={"batchSize": {"sequences": 1}})
        for method in ({}, {"dpo": {}})
    ]
    assert [plan.training.micro_batch_tokens // plan.training.max_length for plan in most] == [1, 2]


def test_quantization_is_shown():
    plan = make_plan(method={"lora": {"quantization": "NF4"}}, resources={"gpus": 1})
    assert plan.lora.quantization == "NF4"
    assert resolved_status(plan, None, None).method == "LoRA r=16 alpha=32 NF4"
    assert make_plan().lora.quantization is None


def test_early_stopping_is_shown():
    assert make_plan().training.early_stopping is None
    plan = make_plan(training={"earlyStopping": {"patience": 3, "minimumImprovement": 0.01}})
    assert resolved_status(plan, None, None).early_stopping == "patience 3, minimum improvement 0.01"


def test_what_is_trained_is_shown():
    method = {"type": "Full", "trainable": {"lastLayers": 2}, "headFirst": {"epochs": 0.5}}
    plan = make_plan(method=method)
    assert (plan.last_layers, plan.head_first.epochs, plan.head_first.learning_rate) == (2, 0.5, 1e-3)
    resolved = resolved_status(plan, None, None)
    assert (resolved.method, resolved.head_first) == ("Full lastLayers=2", "0.5 epochs, learning rate 0.001")
    plan = make_plan(method={"headFirst": {"steps": 7, "learningRate": 0.01}})
    assert (plan.last_layers, plan.head_first.steps) == (None, 7)
    assert resolved_status(plan, None, None).head_first == "7 steps, learning rate 0.01"


@pytest.mark.parametrize(
    ("task", "method", "rate", "output"),
    [
        ("Classification", "LoRA", 5e-4, "Adapter"),
        ("Classification", "Full", 2e-5, "Merged"),
        ("Classification", "Head", 1e-3, "Merged"),
        ("Generation", "LoRA", 2e-4, "Adapter"),
        ("Generation", "Full", 2e-5, "Merged"),
    ],
)
def test_learning_rate_and_output_follow_task_and_method(task, method, rate, output):
    plan = make_plan(task=task, method={"type": method})
    assert plan.training.learning_rate == rate
    assert plan.output.format == output
    assert (plan.lora is not None) == (method == "LoRA")


def test_what_the_user_says_stays_also_where_it_is_zero():
    training = {
        "maxSteps": 5,
        "learningRate": 0.5,
        "batchSize": {"tokens": 4096},
        "microBatchTokens": 7,
        "maxLength": 9,
        "precision": "fp32",
        "seed": 0,
        "schedule": "Linear",
        "warmupRatio": 0,
        "weightDecay": 0,
        "maxGradNorm": 3,
        "activationCheckpointing": True,
        "checkpointSteps": 11,
        "evaluationSteps": 13,
        "earlyStopping": {"patience": 2, "minimumImprovement": 0},
        "compile": True,
    }
    lora = {"rank": 4, "dropout": 0, "targetModules": ["query"]}
    plan = make_plan(Stage.TRAIN, prepared=True, training=training, method={"type": "LoRA", "lora": lora})
    said = plan.training.to_dict()
    assert said.pop("batchTokens") == 4096
    assert said.pop("maxLength") == 128  # what prepare made of it
    assert said == {key: value for key, value in training.items() if key not in ("batchSize", "maxLength")}
    assert (plan.lora.rank, plan.lora.alpha, plan.lora.dropout) == (4, 8, 0)
    assert plan.lora.target_modules == ["query"]


def test_before_prepare_nothing_is_guessed_about_the_data():
    training = make_plan(Stage.PREPARE).training
    assert (training.checkpoint_steps, training.evaluation_steps, training.micro_batch_tokens) == (None, None, None)


def test_after_prepare_the_train_plan_is_complete():
    training = make_plan(Stage.TRAIN, prepared=True).training  # 1000 rows by 32: 32 steps an epoch
    assert (training.checkpoint_steps, training.evaluation_steps) == (5, 32)
    assert training.max_length == 128
    assert 128 <= training.micro_batch_tokens <= 32 * 128


def test_the_datas_length_is_the_bound_also_when_the_model_is_shorter_than_the_wish():
    plan = build_plan(make_resource(True, max_length=77), make_spec(training={"maxLength": 4096}), Stage.TRAIN, LAYOUT)
    assert plan.training.max_length == 77


def test_sources_and_splits_carry_their_place_in_the_spec():
    files = [{"uri": "s3://b/v1.csv", "format": "LabelledText", "columns": {"text": "t"}}, {"uri": "s3://b/v2.csv"}]
    plan = make_plan(
        dataset={
            "sources": [{"uri": "s3://b/a.csv"}, {"uri": "s3://b/b.csv"}],
            "validation": {"sources": files},
            "test": {"fraction": 0.2},
            "labels": ["b", "a"],
            "maxRejected": 0.5,
        }
    )
    dataset = plan.dataset
    assert [source.field for source in dataset.sources] == ["dataset.sources[0]", "dataset.sources[1]"]
    assert [source.field for source in dataset.validation.sources] == [
        "dataset.validation.sources[0]",
        "dataset.validation.sources[1]",
    ]
    assert (dataset.validation.fraction, dataset.test.fraction) == (None, 0.2)
    assert dataset.validation.sources[0].columns.text == "t"
    assert (dataset.labels, dataset.max_rejected) == (["b", "a"], 0.5)


def test_the_gates_metric_is_reported_though_nobody_asked_for_it():
    gate = {"metric": "weightedF1", "minimum": 0.5}
    assert make_plan(evaluation={"gate": gate}).evaluation.metrics == ["macroF1", "accuracy", "loss", "weightedF1"]
    assert make_plan(evaluation={"gate": gate, "metrics": ["weightedF1"]}).evaluation.metrics == ["weightedF1"]


SECRETS = {
    "model": {
        "uri": "hf://owner/name",
        "secretRef": {"name": "hub"},
        "revision": "v1",
        "adapter": {"uri": "pvc://adapters/first", "secretRef": {"name": "adapter-key"}},
    },
    "dataset": {
        "sources": [{"uri": "pvc://data/a_b/ü.jsonl", "secretRef": {"name": "aws"}}],
        "review": {"decisions": [{"uri": "pvc://people/reviewed.jsonl", "secretRef": {"name": "people"}}]},
    },
    "output": {"uri": "pvc://results/run", "secretRef": {"name": "push"}},
}


def test_each_stage_is_told_only_where_its_own_things_are():
    prepare, train, publish = (make_plan(stage, prepared=True, **SECRETS) for stage in Stage)
    assert prepare.model.location.secret_dir == "/secrets/hub"
    assert prepare.dataset.sources[0].location.path == "/sources/pvc/data/a_b/ü.jsonl"
    decisions = prepare.dataset.review.decisions[0]
    assert decisions.field == "dataset.review.decisions[0]"
    assert decisions.location.path == "/sources/pvc/people/reviewed.jsonl"
    assert decisions.location.secret_dir == "/secrets/people"
    assert prepare.model.adapter.path == "/sources/pvc/adapters/first"
    assert prepare.model.adapter.secret_dir == "/secrets/adapter-key"
    assert train.model.adapter == publish.model.adapter == Location(uri="pvc://adapters/first")
    assert prepare.output.location.path is None
    assert publish.output.location.path == "/sources/pvc/results/run"
    assert publish.output.location.secret_dir == "/secrets/push"
    assert publish.model.location.secret_dir is None
    for located in ("/secrets", "/sources"):
        assert located not in train.to_json()
    assert train.model.location.uri == "hf://owner/name"  # the model card names it


def test_a_workspace_of_its_own_and_a_folder_in_a_shared_one():
    own, shared = make_spec(), make_spec(workspace={"claimName": "team-disk"})
    resource = make_resource()
    assert LAYOUT.workspace(resource, own) == "/workspace"
    assert LAYOUT.workspace_uri(resource, own) == "pvc://demo-workspace/artifacts"
    assert LAYOUT.workspace(resource, shared) == "/workspace/demo-0f3a9c52"
    assert LAYOUT.workspace_uri(resource, shared) == "pvc://team-disk/demo-0f3a9c52/artifacts"
    for spec in (own, shared):
        plans = [build_plan(resource, spec, stage, LAYOUT) for stage in (Stage.PREPARE, Stage.PUBLISH)]
        assert [plan.cache for plan in plans] == ["/workspace/.prepared", None]


def test_a_config_map_key_and_a_remote_uri():
    assert LAYOUT.locate("configmap://rows.v1/train.jsonl", None).path == "/sources/configmap/rows.v1/train.jsonl"
    remote = LAYOUT.locate("https://host/file.csv", None)
    assert (remote.path, remote.secret_dir) == (None, None)


@given(st.text(min_size=1, max_size=60) | st.from_regex(r"[./a\\]{1,20}", fullmatch=True))
def test_no_path_leads_out_of_its_claim(path):
    located = LAYOUT.locate(f"pvc://claim/{path}", None).path
    assert located == "/sources/pvc/claim/" or PurePosixPath(located).is_relative_to("/sources/pvc/claim")
    assert ".." not in located.split("/")


def test_a_job_with_method_full_has_no_trace_of_lora_in_its_status():
    plan = make_plan(method={"type": "Full"}, training={"maxSteps": 10, "batchSize": {"tokens": 4096}})
    resolved = resolved_status(plan, None, None)
    assert resolved.to_dict() == {
        "method": "Full",
        "maxSteps": 10,
        "learningRate": "2e-05",
        "schedule": "Cosine",
        "batchSize": "4096 tokens",
        "maxLength": 512,
        "output": "Merged",
        "metrics": ["macroF1", "accuracy", "loss"],
    }


def test_the_device_is_known_when_training_says_so_and_its_end_has_the_last_word():
    plan = make_plan(Stage.TRAIN, prepared=True)
    assert resolved_status(plan, None, None).device is None
    progress = Progress(
        stage=Stage.TRAIN,
        activity="Training",
        fraction=0.1,
        precision="bf16",
        device="NVIDIA H100" + " and a name longer than the schema allows" * 5,
        trainable_parameters=1234,
        updated_at=0,
    )
    running = resolved_status(plan, progress, None)
    assert (running.method, running.batch_size, running.epochs) == ("LoRA r=16 alpha=32", "32 sequences", "3")
    assert (running.precision, running.trainable_parameters) == ("bf16", 1234)
    assert running.device.startswith("NVIDIA H100 and")
    assert len(running.device) <= 128
    train = TrainResult(
        steps=1,
        best_step=1,
        precision="fp32",
        device="cpu",
        trainable_parameters=99,
        split="test",
        baseline="majority",
        scores=[],
    )
    ended = resolved_status(plan, progress, train)
    assert (ended.precision, ended.device, ended.trainable_parameters) == ("fp32", "cpu", 99)


@pytest.mark.parametrize(
    ("gpus", "nodes", "before", "while_it_trains"),
    [
        (0, 1, None, "NVIDIA H100"),
        (1, 1, None, "NVIDIA H100"),
        (4, 1, "4 GPUs", "4 x NVIDIA H100"),
        (1, 2, "2 nodes", "2 nodes x NVIDIA H100"),
        (4, 2, "2 nodes x 4 GPUs", "2 nodes x 4 x NVIDIA H100"),
    ],
)
def test_several_gpus_and_nodes_are_shown(gpus, nodes, before, while_it_trains):
    wanted = {"resources": {"gpus": gpus, "nodes": nodes}, "workspace": {"claimName": "team"}}
    plan = make_plan(Stage.TRAIN, prepared=True, **wanted)
    assert (plan.device.gpus, plan.device.nodes) == (gpus, nodes)
    assert resolved_status(plan, None, None).device == before
    progress = Progress(stage=Stage.TRAIN, activity="Training", fraction=0.1, device="NVIDIA H100", updated_at=0)
    assert resolved_status(plan, progress, None).device == while_it_trains


def test_a_precision_that_the_user_chose_is_shown_at_once():
    assert resolved_status(make_plan(training={"precision": "bf16"}), None, None).precision == "bf16"


def test_every_default_in_the_status_is_a_decimal_that_the_schema_takes():
    for task, method in [("Classification", "LoRA"), ("Generation", "Full"), ("Classification", "Head")]:
        rate = resolved_status(make_plan(task=task, method={"type": method}), None, None).learning_rate
        assert re.fullmatch(r"[0-9.]+(e-[0-9]+)?", rate)


def test_the_key_of_pseudonyms_is_mounted_in_prepare_only():
    settings = {"action": "Pseudonymize", "keySecretRef": {"name": "pseudonyms"}}
    dataset = {"sources": [{"uri": "s3://bucket/data.jsonl"}], "personalData": settings, "clean": {"unicode": "NFC"}}
    spec = make_spec(dataset=dataset)
    assert ("", spec.dataset.personal_data.key_secret_ref) in list(storage_used(spec, Stage.PREPARE))
    assert list(storage_used(spec, Stage.TRAIN)) == []
    prepare, train = (
        make_plan(stage, prepared=True, dataset=dataset).dataset for stage in (Stage.PREPARE, Stage.TRAIN)
    )
    assert (prepare.personal_data.key_dir, train.personal_data.key_dir) == ("/secrets/pseudonyms", None)
    assert prepare.personal_data.settings == spec.dataset.personal_data
    assert prepare.clean == spec.dataset.clean
