"""A teacher that exllamav2 0.1.8 runs: an EXL2 or unquantized Llama folder, over every visible GPU.

As published (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb): `load_autosplit` with a lazy cache, then one `forward` a
question, which does not use the cache. Its states are kept before the final norm, so the head is not run at all.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kd import config
from kd.errors import UserError
from kd.io.progress import progress
from kd.models.check import check_folder
from kd.models.load import model_folder, pad_right
from kd.store.head import TeacherHead

if TYPE_CHECKING:
    import torch

CACHES = {None: "ExLlamaV2Cache", "q4": "ExLlamaV2Cache_Q4", "q6": "ExLlamaV2Cache_Q6", "q8": "ExLlamaV2Cache_Q8"}
SHORTEST_BUFFER = 64  # tokens; the library tries its layers on an input that fills the buffer
# Up to so many tokens a forward, and in layers larger than `max_dq_size`, the library multiplies quantized weights in a
# kernel that adds in whatever order its blocks end, so that two forwards differ; else it dequantizes and asks cuBLAS.
UNORDERED_TOKENS = 32


class ExLlamaV2Teacher:
    """One teacher, loaded."""

    def __init__(self, teacher: config.Teacher, longest: int) -> None:
        library = _library(teacher)
        folder = model_folder(teacher.model)
        check_folder(folder, "exllamav2")
        settings = library.ExLlamaV2Config(str(folder))
        # Together they bound one forward and its scratch memory.
        settings.max_batch_size, settings.max_input_len = teacher.batch_rows, max(longest, SHORTEST_BUFFER)
        self.model = library.ExLlamaV2(settings)
        settings.max_dq_size = max(settings.max_dq_size, settings.hidden_size * settings.intermediate_size)
        # The cache only weighs on how the layers are split over the GPUs: a forward that is not given it ignores it.
        cache = getattr(library, CACHES[teacher.cache])(self.model, max_seq_len=settings.max_input_len, lazy=True)
        with progress((), f"loading {folder.name}", "module", len(self.model.modules)) as bar:
            self.model.load_autosplit(cache, callback=lambda done, _: bar.update(done - bar.n))
        self._quantized = self.model.modules[1].is_quant()  # its first layer

    def states(self, batch: list[list[int]]) -> list[torch.Tensor]:
        """One forward over a batch without the head: per row the final hidden states before the norm, float16.

        The same batch gives the same bits; for that a quantized model reads padding behind a question of few tokens.
        """
        shortest = UNORDERED_TOKENS + 1 if self._quantized else 1
        _, states = self.model.forward(pad_right(batch, shortest), last_id_only=True, return_last_state=True)
        return [row[: len(token_ids)] for row, token_ids in zip(states, batch, strict=True)]

    def head(self) -> TeacherHead:
        """The final norm, as float32 because exllamav2 rounds behind it, and the dequantized output head, float16."""
        norm, head = self.final_modules()
        settings = self.model.config
        weight = head.get_weight_tensor_dq().half().T[: settings.vocab_size]  # rows beyond it are padding
        return TeacherHead(norm.weight.data.to(weight.device).float(), weight, settings.norm_eps)

    def final_modules(self) -> tuple[Any, Any]:
        """The model's own final norm and output head."""
        last = self.model.head_layer_idx
        return self.model.modules[last - 1], self.model.modules[last]


def _library(teacher: config.Teacher) -> Any:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "teacher.backend: exllamav2 needs an NVIDIA GPU and none is visible; run on a machine that has one, or set "
            "`backend: transformers`, which reads an unquantized Llama folder on a CPU"
        )
    if teacher.dtype != "float16":
        raise UserError(f"teacher.dtype: exllamav2 computes in float16, not {teacher.dtype}; set `dtype: float16`")
    try:
        import exllamav2
    except ImportError as error:
        raise UserError(f"teacher.backend: exllamav2 does not import ({error}); {extension_mend()}") from error
    return exllamav2


def extension_mend() -> str:
    """What to do where exllamav2 lacks its compiled extension: in the image, and elsewhere."""
    if "KD_ENVIRONMENT" in os.environ:
        return "this image has no compiled extension; build the other one: docker build --target gpu --tag kd:gpu ."
    return "install requirements.lock with its extra `exllamav2`, and a CUDA compiler (nvcc) that builds its extension"
