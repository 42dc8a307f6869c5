"""The teacher's final norm and output head, kept once for all prompts: what makes logits of a store's states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import UserError
from kd.io.files import sha256
from kd.store.records import MANIFEST, HeadManifest, ModelIdentity, read_sealed, write_sealed
from kd.store.tensors import write_tensors

if TYPE_CHECKING:
    import torch

HEAD_FOLDER = "head"
HEAD_FILE = "head.safetensors"
HEAD_ROWS = 8192  # of the head's weight on their way to the disk at a time


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's final RMS norm and output head: states [tokens, hidden] -> logits [tokens, vocabulary].

    The norm's own dtype says where the teacher rounds: transformers brings the state to the head's dtype before it
    multiplies by the norm's weight, exllamav2 (whose weight is kept as float32) after.
    """

    norm: torch.Tensor
    weight: torch.Tensor
    eps: float

    @property
    def vocabulary_size(self) -> int:
        """How many logits a row has."""
        return self.weight.shape[0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits; the product in the head's own dtype, as in the teacher."""
        return (self.normalized(states) @ self.weight.T).float()

    def normalized(self, states: torch.Tensor) -> torch.Tensor:
        """What the head multiplies: the norm in float32, its result in the head's dtype."""
        import torch

        wide = states.to(self.weight.device).float()  # in this order half as many bytes travel
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.norm * wide.to(self.norm.dtype)).to(self.weight.dtype)

    def to(self, device: str) -> TeacherHead:
        """The same head on another device."""
        return TeacherHead(self.norm.to(device), self.weight.to(device), self.eps)


@dataclass(frozen=True)
class NoHead:
    """Stands in for the head where a store holds logits: rows [tokens, vocabulary] are what they are."""

    vocabulary_size: int
    device: str = "cpu"

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The same logits as float32 on this device."""
        return rows.to(self.device).float()

    def to(self, device: str) -> NoHead:
        """The same for another device."""
        return NoHead(self.vocabulary_size, device)


Head = TeacherHead | NoHead


def write_head(folder: Path, model: ModelIdentity, head: TeacherHead) -> None:
    """Write a teacher's norm and head into an empty `folder`; UserError where they are not all finite numbers."""
    path = folder / HEAD_FILE
    tensors = {"norm.weight": head.norm, "head.weight": head.weight}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{model.name}: {name} is not all finite numbers; mend the weights, or set a wider `teacher.dtype`"
            )
    pieces = (piece for tensor in tensors.values() for piece in tensor.split(HEAD_ROWS))
    write_tensors(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, pieces)
    vocabulary_size, hidden_size = head.weight.shape
    manifest = HeadManifest(
        model=model,
        hidden_size=hidden_size,
        vocabulary_size=vocabulary_size,
        norm_eps=head.eps,
        sha256=sha256(path),
    )
    write_sealed(folder / MANIFEST, manifest)


def read_head_manifest(folder: Path) -> HeadManifest:
    """What a head folder says it holds."""
    manifest: HeadManifest = read_sealed(folder / MANIFEST, HeadManifest)
    return manifest


def read_head(folder: Path) -> tuple[HeadManifest, TeacherHead]:
    """A teacher's head with its checksum verified."""
    from safetensors.torch import load_file

    manifest = verify_head(folder)
    tensors = load_file(folder / HEAD_FILE)
    return manifest, TeacherHead(tensors["norm.weight"], tensors["head.weight"], manifest.norm_eps)


def verify_head(folder: Path) -> HeadManifest:
    """Compare a head with its checksum without loading it."""
    manifest, path = read_head_manifest(folder), folder / HEAD_FILE
    if not path.exists() or sha256(path) != manifest.sha256:
        raise UserError(f"{path}: missing or not what its manifest says; run `kd head` again")
    return manifest
