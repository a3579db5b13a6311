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
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import HERE, ROOT, WORK, cpu_name, execute, say
from ours import Ours
from report import BEST, DEFAULT, OURS, Figures, ratios, table
from theirs import Trl, install_trl, trl_python


def main() -> None:
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


if __name__ == "__main__":
    main()
