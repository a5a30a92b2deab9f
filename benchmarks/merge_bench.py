"""What the merging benchmarks share: where mergekit, the work files and the results lie, and how a result is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gnomon.models.cache import cache_dir

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".bench" / "mergekit" / "bin"
WORK = cache_dir() / "bench" / "merge"
RESULTS = ROOT / "benchmarks" / "results"
OURS = [sys.executable, "-m", "gnomon", "merge", "run"]


def put(name: str, content: dict[str, Any]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    about = {
        "peer": "mergekit 0.1.5", "torch": version("torch"), "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(), "commit": commit.stdout.strip(),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"about": about} | content, indent=1) + "\n")
