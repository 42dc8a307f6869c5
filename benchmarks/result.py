"""What a benchmark leaves behind: benchmarks/results/<name>.json, from which docs/performance.md is written."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "exllamav2", "safetensors", "pandas")


def write_result(name: str, figures: dict[str, float], measured: dict[str, Any]) -> None:
    """Write the figures asked for and everything measured, with hardware, versions, date and command."""
    document = {
        "figures": figures,
        "measured": measured,
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | _versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print("\n" + "\n".join(f"{figure}: {value:.4g}" for figure, value in figures.items()))


def hardware() -> dict[str, Any]:
    """The processor, its cores that this process may use, and the GPUs if torch is loaded."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
