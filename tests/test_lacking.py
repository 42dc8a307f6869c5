"""What Triton's kernels need of a machine, each thing named where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kd import kernels

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("CC", sys.executable)  # a program, if no compiler
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert kernels.lacking() == "an NVIDIA GPU of compute capability 8.0 or more"


def test_an_environment_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert kernels.lacking() == "Triton"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernels.lacking() == "a C compiler (no-such-compiler)"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.lacking() == "a C compiler (gcc or clang)"


def test_no_place_to_keep_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    lacking = kernels.lacking()
    assert lacking is not None
    assert str(tmp_path / "file") in lacking


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")

    def missing() -> list[str]:
        raise AssertionError("libcuda.so cannot found!")

    kernels._launcher_lacks.cache_clear()
    monkeypatch.setattr(driver, "library_dirs", missing)
    assert kernels.lacking() == "libcuda.so.1 where ldconfig finds it"
    kernels._launcher_lacks.cache_clear()
    assert not (tmp_path / "new").exists()  # it only looks


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: none' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(driver, "library_dirs", list)
    assert kernels.lacking() == f"Python's headers and libcuda.so ({compiler}: fatal error: Python.h: none)"


@pytest.mark.parametrize("error", [FileNotFoundError("/sbin/ldconfig"), ImportError("libtriton.so"), RuntimeError("?")])
def test_whatever_else_is_wrong_with_triton_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(_: str) -> None:
        raise error

    monkeypatch.setattr(kernels, "_launcher_lacks", broken)
    assert kernels.lacking() == f"a Triton that works here ({type(error).__name__}: {error})"
