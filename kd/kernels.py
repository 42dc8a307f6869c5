"""What Triton's kernels, of training (kd/distill) and of decoding (kd/assess), need of a machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch


def lacking() -> str | None:
    """What the kernels need and this machine has not; None where they run."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return "an NVIDIA GPU of compute capability 8.0 or more"
    if find_spec("triton") is None:
        return "Triton"
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # in Triton's order
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return f"a C compiler ({' or '.join(names)})"
    try:
        return _folder_lacks() or _launcher_lacks(compiler)
    # A Triton that does not import, no ldconfig, a folder that may not be looked into.
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"a Triton that works here ({type(error).__name__}: {' '.join(str(error).split())})"


def _folder_lacks() -> str | None:
    """What keeps Triton from keeping its kernels; None if nothing."""
    from triton.runtime.cache import default_cache_dir

    folder = Path(os.environ.get("TRITON_CACHE_DIR", "").strip() or default_cache_dir()).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return None
    return f"to write to {there}, where they are kept, or another TRITON_CACHE_DIR"


@cache
def _launcher_lacks(compiler: str) -> str | None:
    """What Triton lacks to compile a kernel's launcher, which is C, beside the `compiler`; None if nothing."""
    from triton.backends.nvidia import driver

    try:
        libraries = driver.library_dirs()
    except AssertionError:  # its way to say so
        return "libcuda.so.1 where ldconfig finds it"
    headers = [sysconfig.get_paths()["include"], *driver.include_dir]
    with TemporaryDirectory() as folder:
        command = [compiler, "-shared", "-fPIC", "-o", f"{folder}/launcher.so", *(f"-I{path}" for path in headers)]
        command += ["-x", "c", "-", *(f"-L{path}" for path in libraries), "-lcuda"]
        code = "#include <Python.h>\n#include <cuda.h>\n"
        done = subprocess.run(command, input=code, capture_output=True, text=True)
    said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return f"Python's headers and libcuda.so ({compiler}: {said[0]})" if done.returncode else None
