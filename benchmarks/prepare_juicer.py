"""One run of data-juicer, in its own environment: `python prepare_juicer.py INPUT FOLDER PROCESSES`.

It is run as `dj-process` runs it, with less around it: no trace, no report of resources, one thing after another.
"""

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

from data_juicer.config import init_configs
from data_juicer.core import DefaultExecutor
from loguru import logger

LOADED_LATE = ("ftfy", "scipy.integrate", "torch")
"""By the operators; here before the clock starts."""

CARDS = r"(?<![\w.-])(?:\d{4}[ -]?){3}\d{1,7}(?!\w|[.-]\d)|(?<![\w.-])3\d{3}[ -]?\d{6}[ -]?\d{5}(?!\w|[.-]\d)"
NOT_MASKED = ("paths", "ids", "id_cards", "channel_ids", "platform_open_ids", "macs")
OPERATORS = [
    {"fix_unicode_mapper": {"normalization": "NFC"}},
    {"whitespace_normalization_mapper": {}},
    {"text_length_filter": {"min_len": 20, "max_len": 100_000}},
    {"word_repetition_filter": {"rep_len": 5, "max_ratio": 0.2}},
    {"language_id_score_filter": {"lang": ["en", "de", "fr", "es"], "min_score": 0.2}},
    {
        "pii_redaction_mapper": {
            **{
                f"mask_{what}": False
                for what in ("paths", "ids", "id_cards", "channel_ids", "platform_open_ids", "macs")
            },
            "extra_patterns": [[CARDS, "[CARD_REDACTED]"]],
        }
    },
    {"document_deduplicator": {}},
    {
        "document_minhash_deduplicator": {
            "tokenization": "space",
            "window_size": 3,
            "lowercase": True,
            "num_permutations": 128,
            "jaccard_threshold": 0.7,
        }
    },
]
DONE = re.compile(r"OP \[(\w+)\] Done in ([\d.]+)s\. Left (\d+) samples")


def main() -> None:
    for name in LOADED_LATE:
        importlib.import_module(name)
    source, folder, processes = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    recipe = {
        "dataset_path": source,
        "export_path": str(folder / "kept.jsonl"),
        "work_dir": str(folder / "work"),
        "ds_cache_dir": str(folder / "cache"),
        "np": int(processes),
        "auto_op_parallelism": False,
        "open_monitor": False,
        "open_tracer": False,
        "turbo": True,
        "process": OPERATORS,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    steps = []
    executor = DefaultExecutor(init_configs(["--config", str(path)]))
    logger.add(lambda message: steps.extend(DONE.findall(str(message))), level="INFO")
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    executor.run(skip_return=True)
    figures = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": sum(os.times()[:4]) - cpu,
        "steps": [[name, float(seconds), int(left)] for name, seconds, left in dict.fromkeys(steps)],
    }
    (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
