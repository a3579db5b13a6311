"""Our trainer against TRL's SFTTrainer: the same weights, rows, loss mask, LoRA, optimizer, schedule and dtype.

    .venv/bin/python benchmarks/train.py [--json FILE] [sizes]

Contestants, each a process of its own, in turn, over several rounds:

    ours          the stages prepare, train and publish with the plan that the operator makes
    TRL default   SFTTrainer as it comes, but for what all three share
    TRL best      the fastest, in a trial run before, of packing and length grouping without checkpointing

A rate is tokens over the seconds of the optimizer steps; models are loaded and saved outside of it.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_api.constants import Stage
from finetune_api.progress import Result
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.local import LocalLayout
from finetune_operator.observed import Resource
from finetune_operator.plans import build_plan
from report import BEST, DEFAULT, OURS, Figures, ratios, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
WORK = BUILD / "benchmark-train"
TRL_VENV = BUILD / "trl-venv"
LOCK = ROOT / "requirements.lock"
TRL_PACKAGES = ("trl==1.16.0", "torch", "transformers", "peft", "accelerate")
"""All but the first as they are locked."""

ROWS_PER_STEP = 8
"""TRL's own default, so that it need not be changed for anybody."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of the blocks: what ours takes by itself."""
NEVER = 10_000_000


class Ours:
    """Our side: plans as the operator makes them, stages as the pods run them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.workspace = WORK / "workspace"
        self._options = options
        self._document: dict[str, Any] = {
            "metadata": {"namespace": "benchmark", "name": "ours", "uid": "0001"},
            "spec": job_spec(options),
            "status": {},
        }

    def prepare(self) -> None:
        """Makes the workspace that all contestants take model and rows from."""
        found = self._run(Stage.PREPARE).prepare
        if found is None:
            raise SystemExit("the prepare stage gave no facts")
        self._document["status"] = {"data": found.data.to_dict(), "model": found.model.to_dict()}
        self.data, self.model = found.data, found.model

    def train(self, adapter: Path) -> Figures:
        """One training from the start; its adapter goes to `adapter`."""
        self._forget()
        figures = WORK / "ours.figures.json"
        train = self._run(Stage.TRAIN, (figures, "time")).train
        if train is None or train.tokens_per_second is None:
            raise SystemExit("the train stage gave no result")
        self._run(Stage.PUBLISH)
        shutil.move(self.workspace / "artifacts", adapter)
        tokens = self.data.tokens * self._options.epochs
        return Figures(
            steps=train.steps,
            seconds=tokens / train.tokens_per_second,
            cpu_seconds=json.loads(figures.read_text(encoding="utf-8"))["cpu_seconds"],
            tokens=tokens,
            supervised_tokens=self.data.supervised_tokens * self._options.epochs,
            peak_memory_bytes=train.peak_memory_bytes or 0,
        )

    def profile(self) -> dict[str, Any]:
        """One more training, of few steps, under torch.profiler."""
        self._forget()
        steps = {"maxSteps": self._options.profile_steps, "epochs": None}
        training = {**self._document["spec"]["training"], **steps}
        plan = self._plan(Stage.TRAIN, {**self._document["spec"], "training": training})
        path = WORK / "profile.json"
        command = [sys.executable, HERE / "ours_train.py", plan, path, "profile"]
        execute(command, "profile", self._options, telemetry())
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _run(self, stage: Stage, watched: tuple[Any, ...] = ()) -> Result:
        """`watched`: for train, figures and kind of ours_train.py, which runs the same stage."""
        message, plan = WORK / f"{stage}.message.json", self._plan(stage)
        command = (
            [HERE / "ours_train.py", plan, *watched] if watched else ["-m", "finetune_trainer", stage, "--plan", plan]
        )
        execute([sys.executable, *command], f"ours {stage}", self._options, telemetry(message))
        return Result.model_validate_json(message.read_bytes())

    def _plan(self, stage: Stage, spec: dict[str, Any] | None = None) -> Path:
        document = {**self._document, "spec": spec or self._document["spec"]}
        parsed = FineTuneJobSpec.model_validate(document["spec"])
        plan = build_plan(Resource.read(document), parsed, stage, LocalLayout(WORK, WORK))
        path = WORK / f"{stage}.plan.json"
        path.write_text(plan.to_json(indent=2), encoding="utf-8")
        return path

    def _forget(self) -> None:
        for name in ("checkpoints", "artifacts"):
            shutil.rmtree(self.workspace / name, ignore_errors=True)


def job_spec(options: argparse.Namespace) -> dict[str, Any]:
    """The FineTuneJob; evaluation and checkpoints only at the end, as TRL is told, too."""
    return {
        "task": "Generation",
        "model": {"uri": "file://model"},
        "dataset": {
            "sources": [{"uri": "file://train.jsonl"}],
            "validation": {"sources": [{"uri": "file://held-out.jsonl"}]},
        },
        "method": {"type": "LoRA", "lora": {"rank": options.rank, "alpha": 2 * options.rank, "dropout": 0}},
        "training": {
            "epochs": options.epochs,
            "learningRate": options.learning_rate,
            "batchSize": {"sequences": ROWS_PER_STEP},
            "maxLength": options.max_length,
            "precision": options.precision,
            "seed": options.seed,
            "schedule": "Linear",
            "warmupRatio": 0,
            "weightDecay": 0.01,
            "maxGradNorm": 1,
            "checkpointSteps": NEVER,
            "evaluationSteps": NEVER,
        },
        "resources": {"gpus": options.gpus},
    }


class Trl:
    """The other side, in an environment of its own."""

    def __init__(self, options: argparse.Namespace, ours: Ours) -> None:
        self._options = options
        self._ours = ours
        self._rows = WORK / "rows.jsonl"
        execute([sys.executable, __file__, "--export-rows", ours.workspace, self._rows], "export", options)

    def train(self, name: str, changes: dict[str, Any], adapter: Path, first_rows: int | None = None) -> Figures:
        """One training; of the first rows only, if asked for."""
        result = WORK / "trl.result.json"
        trial = {
            "model": str(self._ours.workspace / "model"),
            "rows": str(self._rows),
            "first_rows": first_rows,
            "cache": str(WORK / "datasets"),
            "output": str(adapter),
            "result": str(result),
            "settings": {**self._shared(), **changes},
            "lora": {
                "r": self._options.rank,
                "lora_alpha": 2 * self._options.rank,
                "lora_dropout": 0.0,
                "target_modules": list(TARGETS),
            },
        }
        path = WORK / "trl.trial.json"
        path.write_text(json.dumps(trial, indent=2), encoding="utf-8")
        result.unlink(missing_ok=True)
        execute([trl_python(), HERE / "trl_sft.py", path], name, self._options)
        figures = json.loads(result.read_text(encoding="utf-8"))
        return Figures(**{field: figures[field] for field in Figures.__dataclass_fields__ if field in figures})

    def candidates(self) -> dict[str, dict[str, Any]]:
        """Settings that could be TRL's fastest; each makes optimizer steps of as many tokens as the others do."""
        budget = ROWS_PER_STEP * self._options.mean_length
        found = {
            f"packs of {budget // parts}, {parts} a step": {
                "packing": True,
                "max_length": budget // parts,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": parts,
            }
            for parts in (1, 2, 4)
            if budget // parts >= self._ours.data.max_length
        }
        for rows in (ROWS_PER_STEP, ROWS_PER_STEP // 4):
            found[f"grouped by length, {rows} rows x {ROWS_PER_STEP // rows}"] = {
                "train_sampling_strategy": "group_by_length",
                "max_length": self._options.max_length,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": ROWS_PER_STEP // rows,
            }
        load: dict[str, Any] = {"attn_implementation": self._options.trl_attention}
        if self._options.precision == "bf16":
            load["dtype"] = "bfloat16"
        fast = {"gradient_checkpointing": False, "model_init_kwargs": load}
        return {name: {**settings, **fast} for name, settings in found.items()}

    def default(self) -> dict[str, Any]:
        return {"max_length": self._options.max_length, "per_device_train_batch_size": ROWS_PER_STEP}

    def _shared(self) -> dict[str, Any]:
        options = self._options
        return {
            "num_train_epochs": options.epochs,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "optim": "adamw_torch_fused",
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "seed": options.seed,
            "bf16": options.precision == "bf16",
            "use_cpu": options.gpus == 0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


def main() -> None:
    if sys.argv[1:2] == ["--export-rows"]:
        export_rows(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    options = read_options()
    install_trl()
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "adapters").mkdir(parents=True)
    say("making the model and the rows")
    (WORK / "sizes.json").write_text(json.dumps(vars(options), default=str), encoding="utf-8")
    execute([sys.executable, HERE / "workload.py", WORK, WORK / "sizes.json"], "workload", options)
    ours = Ours(options)
    ours.prepare()
    trl = Trl(options, ours)
    trials = {name: trial_rate(trl, name, changes, options) for name, changes in trl.candidates().items()}
    best = max(trials, key=lambda name: trials[name])
    rounds = [dict(play(ours, trl, trl.candidates()[best], number)) for number in range(options.repeats)]
    untuned = judge(ours, rounds, options)
    report = {
        "setup": describe(options, ours),
        "trl_trials_tokens_per_second": trials,
        "trl_best": best,
        "untuned_held_out_loss": untuned,
        "rounds": [{name: asdict(figures) for name, figures in each.items()} for each in rounds],
        "ratios": {rival: ratios(rounds, rival) for rival in (DEFAULT, BEST)},
        "profile": ours.profile() if options.profile_steps else None,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(report, rounds)))


def play(ours: Ours, trl: Trl, best: dict[str, Any], number: int) -> Iterator[tuple[str, Figures]]:
    """One round; who begins changes from round to round."""
    players = {
        OURS: ours.train,
        DEFAULT: lambda folder: trl.train(DEFAULT, trl.default(), folder),
        BEST: lambda folder: trl.train(BEST, best, folder),
    }
    names = list(players)
    for name in names[number % 3 :] + names[: number % 3]:
        figures = players[name](adapter_folder(name, number))
        say(f"round {number + 1}: {name}: {figures.rate:.0f} tokens/s")
        yield name, figures


def trial_rate(trl: Trl, name: str, changes: dict[str, Any], options: argparse.Namespace) -> float:
    figures = trl.train(f"trial {name}", changes, WORK / "trial", options.trial_rows)
    rate = figures.rate
    say(f"TRL with {name}: {rate:.0f} tokens/s on {options.trial_rows} rows")
    return rate


def judge(ours: Ours, rounds: list[dict[str, Figures]], options: argparse.Namespace) -> float:
    """Fills in the held-out losses, all from one evaluator; returns that of the untuned model."""
    path = WORK / "held-out.json"
    names = {f"{name}/{number}": (name, number) for number, each in enumerate(rounds) for name in each}
    adapters = [f"{key}={adapter_folder(*place)}" for key, place in names.items()]
    execute([sys.executable, HERE / "held_out.py", ours.workspace, path, *adapters], "held-out", options)
    losses = json.loads(path.read_text(encoding="utf-8"))
    for key, (name, number) in names.items():
        rounds[number][name].held_out_loss = losses[key]
    return float(losses["untuned"])


def adapter_folder(name: str, number: int) -> Path:
    return WORK / "adapters" / f"{name.replace(' ', '-')}-{number}"


def describe(options: argparse.Namespace, ours: Ours) -> dict[str, Any]:
    def output(*command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()

    versions = "; ".join(f"print(version('{name}'))" for name in ("torch", "transformers", "peft", "trl"))
    theirs = output(trl_python(), "-c", f"from importlib.metadata import version; {versions}").split()
    data, model = ours.data, ours.model
    return {
        "model": f"Llama, {model.layers} layers of width {model.hidden_size}, vocabulary {model.vocabulary_size}, "
        f"{model.parameters / 1e6:.1f} M parameters, LoRA rank {options.rank} on all linear layers",
        "data": f"{data.train_rows} rows, {data.tokens} tokens, {data.supervised_tokens} of them supervised, "
        f"mean length {data.tokens / data.train_rows:.0f}, {data.truncated_rows} cut",
        "precision": options.precision,
        "device": output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        if options.gpus
        else f"CPU, {options.threads} threads, {cpu_name()}",
        "software": "torch {}, transformers {}, peft {}, TRL {}".format(*theirs),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "changed_files": output("git", "status", "--short", "trainer-image", "operator", "crds").splitlines(),
        "load_before": options.load_before,
        "profile_steps": options.profile_steps,
        "options": {name: str(value) for name, value in vars(options).items()},
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def export_rows(workspace: Path, target: Path) -> None:
    """The prepared training rows for TRL: input_ids, and labels with -100 where there is no loss."""
    from finetune_trainer.data.store import open_split

    rows = open_split(workspace / "data", "train")
    with target.open("w", encoding="utf-8") as file:
        for row in range(len(rows)):
            ids, supervised = rows.input_ids(row).tolist(), rows.loss_mask(row).tolist()
            labels = [token if learned else -100 for token, learned in zip(ids, supervised, strict=True)]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def install_trl() -> None:
    """TRL in a virtual environment of its own, with the locked versions of what both sides use."""
    stamp = TRL_VENV / "benchmark-packages"
    wanted = "\n".join(TRL_PACKAGES) + "\n" + LOCK.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    say(f"installing {TRL_PACKAGES[0]} in {TRL_VENV.relative_to(ROOT)}")
    if not trl_python().exists():
        venv.create(TRL_VENV, with_pip=True)
    pip = [str(trl_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(LOCK), *TRL_PACKAGES], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def trl_python() -> Path:
    return TRL_VENV / "bin" / "python"


def telemetry(message: Path | None = None) -> dict[str, str]:
    where = {"FINETUNE_TERMINATION_LOG": str(message)} if message else {}
    return {"FINETUNE_TELEMETRY_PORT": "0", **where}


def execute(
    command: list[Any], name: str, options: argparse.Namespace, environment: dict[str, str] | None = None
) -> None:
    """Runs a process with the same threads and no hub; its output goes to a log that is shown if it fails."""
    shared = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    log = WORK / "logs" / f"{name.replace(' ', '-').replace(',', '')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.run(
            [str(part) for part in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **shared, **(environment or {})},
            cwd=ROOT,
            check=False,
        )
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{name} failed with exit code {process.returncode} ({log}):\n{tail}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, help="write all figures to this file")
    add("--repeats", type=int, default=3, help="rounds (3)")
    add("--rows", type=int, default=160, help="training rows (160)")
    add("--trial-rows", type=int, default=48, help="rows to find TRL's best setting with (48)")
    add("--held-out", type=int, default=24, help="rows to judge by (24)")
    add("--epochs", type=int, default=1, help="passes over the rows (1)")
    add("--layers", type=int, default=12, help="of the model (12)")
    add("--hidden", type=int, default=256, help="its width (256)")
    add("--heads", type=int, default=8, help="its attention heads (8); half as many for keys and values")
    add("--vocabulary", type=int, default=8192, help="of its tokenizer (8192)")
    add("--mean-length", type=int, default=256, help="of the rows, in tokens (256)")
    add("--sigma", type=float, default=0.8, help="of the logarithm of their lengths (0.8)")
    add("--max-length", type=int, default=1024, help="longest row (1024, TRL's default)")
    add("--rank", type=int, default=16, help="of LoRA (16); alpha is twice that")
    add("--learning-rate", type=float, default=1e-3, help="peak (1e-3)")
    add("--precision", choices=["fp32", "bf16"], help="left out: bf16 on CUDA, else fp32")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if there is one")
    add("--trl-attention", default="sdpa", help="attn_implementation of TRL's best (sdpa)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contestant (all CPUs)")
    add("--profile-steps", type=int, default=6, help="steps of ours under torch.profiler at the end (6; 0: none)")
    add("--seed", type=int, default=42, help="of model, rows and training (42)")
    options = parser.parse_args()
    probe = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    if options.device == "auto":
        found = subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
        options.device = "cuda" if found else "cpu"
    options.load_before = os.getloadavg()[0]
    options.gpus = int(options.device == "cuda")
    options.precision = options.precision or ("bf16" if options.gpus else "fp32")
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
