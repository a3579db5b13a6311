"""How the operator does with a thousand jobs on a hundred nodes that do not exist.

It needs a test cluster (KUBECONFIG) in which no other operator serves all namespaces, and its tool, which makes fake
nodes (FINETUNE_CLUSTER_TOOL). The operator of this tree runs as a process of this machine, on a namespace of its own.
Nodes, namespace and volumes are removed at the end; the CustomResourceDefinition stays.
"""

import argparse
import asyncio
import os
import platform
import signal
import subprocess
from pathlib import Path

from benchmarks.operator.scenarios import SCENARIOS

CRD = Path(__file__).resolve().parents[2] / "crds" / "finetunejobs.yaml"
VERDICT = {True: "yes", False: "**no**", None: ""}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS, help="these scenarios (all)")
    parser.add_argument("--jobs", type=int, help="jobs per scenario (1000; 200 trainers)")
    parser.add_argument("--nodes", type=int, default=100, help="fake nodes, with 8 GPUs each (100)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # nothing is left behind then, either
    apply = ["kubectl", "apply", "--server-side", "--force-conflicts", "-f", str(CRD)]
    subprocess.run(apply, check=True, stdout=subprocess.DEVNULL)
    print(f"{processor()}, {os.cpu_count()} CPUs for cluster, operator and benchmark; load {os.getloadavg()[0]:.1f}")
    for name in options.only:
        scenario, jobs, words = SCENARIOS[name]
        figures = asyncio.run(scenario(options.jobs or jobs, options.nodes))
        print(f"\n| {options.jobs or jobs} {words} | found | target | met |\n|---|---:|---:|---|")
        for figure in figures:
            print(f"| {figure.what} | {figure.found} | {figure.target} | {VERDICT[figure.good]} |", flush=True)


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
