"""Fixtures: a tiny random Llama, and a folder to run `kd` in."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from tiny import make_tiny_llama

from kd.audit.logs import SHA256, is_published

REPOSITORY = Path(__file__).parent.parent

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels; it is asked for before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


# What takes about ten seconds and more, the longest first.
LONG = (
    "test_pipeline.py test_engine.py test_search.py test_rehearse_forecast.py test_checkouts.py test_profiles.py "
    "test_share.py test_advice.py test_kernels.py test_extract.py test_audit.py test_attention.py test_seeds.py"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go first: were one the last, one process would be at it alone."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """What is imported is no garbage, so the collector need not go through it."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def make_tiny_params(tiny_llama: Path) -> dict[str, Any]:
    """profiles/mini.yaml with the tiny Llama on both sides, the paper's protocol and epochs and a handful of rows."""
    params: dict[str, Any] = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["dataset"] |= {"answers": "socratic", "train_rows": 12, "test_rows": 6}
    params["teacher"]["model"] = params["student"]["model"] = {"source": "folder", "path": str(tiny_llama)}
    params["distill"] |= {"protocol": "published", "epochs": 2, "cosine_steps": 12, "dropouts": {}}
    params["assess"]["max_new_tokens"] = params["untrained"]["no-distillation"]["max_new_tokens"] = 6
    return params


@pytest.fixture
def tiny_params(tiny_llama: Path) -> dict[str, Any]:
    """The params of `make_tiny_params`, to be changed."""
    return make_tiny_params(tiny_llama)


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program named `python` whose `-m kd` begins at once."""
    from forked import quick_python

    return quick_python(tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="session")
def gpu() -> None:
    """For what runs on a GPU: skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is about the CPU: on a machine with a GPU none is visible, to this process or its children."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def gpu_llama(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in sizes that a GPU's kernels take; its 401 tokens are a multiple of nothing."""
    del gpu
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    return make_tiny_llama(tmp_path_factory.mktemp("gpu-llama"), vocabulary=401, **sizes)


@pytest.fixture
def gpu_params(gpu_llama: Path, tiny_params: dict[str, Any]) -> dict[str, Any]:
    """The tiny params with that Llama on both sides."""
    tiny_params["teacher"]["model"] = tiny_params["student"]["model"] = {"source": "folder", "path": str(gpu_llama)}
    return tiny_params


@pytest.fixture
def memory_limit() -> Iterator[Callable[[int], None]]:
    """Let this process take no more than so many bytes of the GPU's memory beyond what it has now."""

    def limit(more: int) -> None:
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def write_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Make tmp_path the working folder and write its params.yaml."""
    monkeypatch.chdir(tmp_path)

    def write(params: dict[str, Any]) -> None:
        YAML().dump(params, Path("params.yaml"))

    return write


@pytest.fixture(scope="session")
def published_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's own logs: data/published where fetched, else from the DVC remote beside a checkout."""
    here = REPOSITORY / "data" / "published"
    if all(is_published(here / name) for name in SHA256):
        return here
    remote = REPOSITORY.parent / "shared" / "dvc"
    if not remote.exists():
        pytest.skip("the published logs are not here; `kd data fetch` brings them")
    from dvc.cli import main as dvc

    folder = tmp_path_factory.mktemp("published")
    shutil.copy(REPOSITORY / "data.dvc", folder)
    with chdir(folder):
        for command in (
            "init --quiet --no-scm",
            f"remote add --quiet shared {remote}",
            "pull --quiet -r shared data.dvc",
        ):
            assert dvc(command.split()) == 0
    return folder / "data" / "published"


def environment() -> dict[str, str]:
    """The environment of a command run by a test: the programs installed beside this Python come first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
