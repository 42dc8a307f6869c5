"""Where training stands, on disk: trained weights, momenta, random state and the loss curve so far, which says how many
updates were made. The learning rate follows from their number."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kd.distill.step import Descent
from kd.errors import UserError
from kd.io.files import read_json, whole_folder, write_json
from kd.store.tensors import write_tensors


@dataclass(frozen=True)
class Record:
    """One update: its number from 1, its examples, and the losses before it. `divergence` is None without a teacher."""

    step: int
    examples: list[str]
    loss: float
    cross_entropy: float
    divergence: float | None
    learning_rate: float


def save(folder: Path, descent: Descent, curve: list[Record]) -> None:
    """Keep the state after the last update of `curve` as `folder`/<its number>, whole, in place of earlier ones."""
    tensors = {"weights": descent.weights, "momenta": descent.momenta, **_random_states()}
    target = folder / f"{len(curve):08d}"
    with whole_folder(target, folder / "unfinished") as work:
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(work / "state.safetensors", shapes, tensors.values())
        write_json(work / "curve.json", [asdict(record) for record in curve])
    for earlier in _found(folder):
        if earlier != target:
            shutil.rmtree(earlier)


def load(folder: Path, descent: Descent) -> list[Record]:
    """Take the state of the latest checkpoint, if there is one; the loss curve up to it."""
    found = _found(folder)
    if not found:
        return []
    mend = f"remove {found[-1]} to start anew"
    try:
        tensors = load_file(found[-1] / "state.safetensors")
    except SafetensorError as error:
        raise UserError(f"{found[-1]}: not a readable checkpoint ({error}); {mend}") from None
    descent.weights.copy_(tensors["weights"])
    descent.momenta.copy_(tensors["momenta"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return [Record(**record) for record in read_json(found[-1] / "curve.json", "a checkpoint's loss curve", mend)]


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`."""
    return next(iter(reversed(_found(folder))), None)


def going_on(folder: Path) -> str:
    """What a run that finds `folder` does, for a person to read."""
    found = latest(folder)
    return f"goes on from {found}" if found else "starts over, as there is no checkpoint yet"


def _found(folder: Path) -> list[Path]:
    """Whole checkpoints, the latest last; one that a killed run was removing does not count."""
    files = ("state.safetensors", "curve.json")
    return [path for path in sorted(folder.glob("[0-9]" * 8)) if all((path / name).exists() for name in files)]


def _random_states() -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    return states | ({"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
