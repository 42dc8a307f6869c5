"""A checkout with a profile's results, as `kd publish crate` finds it, made without training anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import pytest
from params import keep
from rows import prepare_tests
from ruamel.yaml import YAML
from safetensors.numpy import save_file

from kd.cli import main
from kd.config import load_config
from kd.machine.record import write_record
from kd.publish.lock import dvc_md5
from kd.scoring.log import Response, log_text

REPOSITORY = Path(__file__).parent.parent
ARTIFACTS = Path("artifacts/mini")
ROWS = 6
CHECKOUT = ("CITATION.cff", "LICENSE", "NOTICE", "dvc.yaml", "requirements.lock")
METADATA, PREVIEW = "ro-crate-metadata.json", "ro-crate-preview.html"
LORA = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": np.ones((2, 2)) for side in "AB"}


def write_checkout(folder: Path) -> None:
    """Two students and two untrained rows, each a log of six answers; a report, its charts and records of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in CHECKOUT:
            shutil.copy(REPOSITORY / name, folder)
        params = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
        params["dataset"]["test_rows"] = ROWS
        keep(params, "base-kd", "fine-tuning", "no-distillation", "no-distillation-matched")
        YAML().dump(params, Path("params.yaml"))
        config = load_config(Path("params.yaml"))
        tests = prepare_tests((f"How many are {i} and 2?", f"They are {i + 2}.\n#### {i + 2}") for i in range(ROWS))
        (ARTIFACTS / "logs").mkdir()
        for right, (run, asked) in enumerate(config.experiments.items()):
            answers = [Response(f" \\boxed{{{i + 2 if i < right else 99}}}", 5, i == 4) for i in range(ROWS)]
            text = log_text(tests, [test.question + asked.suffix for test in tests], answers)
            (ARTIFACTS / "logs" / f"{run}.csv").write_text(text, encoding="utf-8", newline="")
        for run in config.adapters:
            write_adapter(ARTIFACTS / "adapters" / run)
            write_record(config, f"train/{run}", datetime(2026, 1, 2, tzinfo=UTC))
        assert main(["report"]) == 0
        write_lock()


def write_adapter(folder: Path) -> None:
    """What training leaves, as far as a crate looks at it."""
    metrics = folder / "loss" / "plots" / "metrics"
    metrics.mkdir(parents=True)
    (metrics / "loss.tsv").write_text("step\tloss\n1\t2.5\n2\t2.25\n")
    (folder / "README.md").write_text(f"# {folder.name}\n")
    (folder / "adapter_config.json").write_text("{}\n")
    (folder / "check.json").write_text(json.dumps({"check_loss": None, "versions": {"torch": "2.4.0"}}))
    save_file(LORA, folder / "adapter_model.safetensors")


def write_lock() -> None:
    """dvc.lock, as `dvc repro` would write it of what is there."""
    params = YAML(typ="safe").load(Path("params.yaml"))
    stages = {}

    def stage(command: str, out: Path, keys: list[str], *deps: Path) -> None:
        stages[command] = {
            "cmd": f"python -m kd {command}",
            "deps": [{"path": path.as_posix()} for path in (Path("kd/cli.py"), *deps)],
            "params": {"params.yaml": {key: params[key] for key in keys}},
            "outs": [{"path": out.as_posix(), "md5": dvc_md5(out)}],
        }

    tests, adapters = ARTIFACTS / "data/test.jsonl", sorted((ARTIFACTS / "adapters").iterdir())
    stage("prepare", ARTIFACTS / "data", ["dataset"])
    for name in ("inputs", "attention"):
        if (ARTIFACTS / name).exists():
            stage(name, ARTIFACTS / name, ["dataset"])
    for folder in adapters:
        stage(f"train {folder.name}", folder, ["distill"], tests)
    for log in sorted((ARTIFACTS / "logs").iterdir()):
        there = [folder for folder in adapters if folder.name == log.stem]
        stage(f"assess {log.stem}", log, ["assess"], tests, *there)
    for store in sorted((ARTIFACTS / "teacher").glob("*")):
        stage(f"teacher {store.name}", store, ["teacher"])
    stage("report", ARTIFACTS / "report", ["distill", "assess"], tests, ARTIFACTS / "adapters", ARTIFACTS / "logs")
    YAML().dump({"schema": "2.0", "stages": stages}, Path("dvc.lock"))


def rewritten(
    crate: Path,
    changes: Mapping[str, bytes | None] = MappingProxyType({}),
    more: Iterable[tuple[str | ZipInfo, bytes]] = (),
    method: int = ZIP_STORED,
) -> Path:
    """A copy of a crate, in which files have other bytes or (None) are left out, and `more` members are."""
    target = crate.with_name("changed.zip")
    with ZipFile(crate) as archive, ZipFile(target, "w", method) as changed:
        members = [(name, changes.get(name, archive.read(name))) for name in archive.namelist()]
        for name, content in (*members, *more):
            if content is not None:
                changed.writestr(name, content)
    return target
