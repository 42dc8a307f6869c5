"""A teacher that exllamav2 0.1.8 runs: an EXL2 or unquantized Llama folder, over every visible GPU.

As published (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb): one forward a question, without a cache. There the library
loads its modules onto one GPU after another and runs them so, one GPU at a time. Here every GPU has as much to do, and
works at the same time as the others, each on a batch of its own: the library's modules in the library's order, so the
same bits. States are kept before the final norm, so the head is not run at all, and is loaded only to be kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from itertools import accumulate, pairwise, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import config
from kd.errors import UserError
from kd.io.progress import progress
from kd.models.check import check_folder
from kd.models.load import model_folder, pad_right
from kd.store.head import TeacherHead
from kd.teacher.backends.placement import GIB, Forward, Part, place
from kd.teacher.pipeline import pipeline, threads

if TYPE_CHECKING:
    import torch

SHORTEST_BUFFER = 64  # tokens
# Up to so many tokens a forward, and in layers larger than `max_dq_size`, the library multiplies quantized weights in a
# kernel that adds in whatever order its blocks end, so that two forwards differ; else it dequantizes and asks cuBLAS.
UNORDERED_TOKENS = 32
CPU = -1  # as the library numbers devices


class ExLlamaV2Teacher:
    """One teacher, its layers loaded; a UserError where they would not fit."""

    def __init__(self, teacher: config.Teacher, longest: int) -> None:
        import torch

        folder, model = _model(teacher, longest)
        shape, _, quantized = check_folder(folder)
        self._shortest = UNORDERED_TOKENS + 1 if quantized else 1
        embedding, *layers = model.modules[: model.head_layer_idx - 1]
        parts = [Part(one.numel(), one.weight_footprint() if quantized else 2 * one.numel()) for one in layers]
        free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]
        forward = Forward(shape, quantized, model.config.max_batch_size, model.config.max_input_len)
        ends = [0, *accumulate(place(parts, free, forward))]
        placed = [(gpu, layers[start:end]) for gpu, (start, end) in enumerate(pairwise(ends))]
        self._stages = [Stage(CPU, [embedding]), *(Stage(gpu, modules) for gpu, modules in placed if modules)]
        _load(model, self._stages, f"loading {folder.name}")
        print(f"teacher: {_holdings(self._stages)}", file=sys.stderr)

    def states(self, batches: Iterable[list[list[int]]]) -> Generator[list[torch.Tensor], None, None]:
        """Per batch a forward without the head: for each row the final hidden states before the norm, float16, in the
        CPU's memory.

        The same batch gives the same bits; for that a quantized model reads padding behind a question of few tokens.
        """
        batches, read = tee(batches)
        padded = (pad_right(batch, self._shortest) for batch in read)
        with closing(pipeline(self._stages, padded)) as stream:
            for states, batch in zip(stream, batches, strict=True):
                yield [row[: len(token_ids)] for row, token_ids in zip(states, batch, strict=True)]


class Stage:
    """Modules of the library that follow one another on a device: what `ExLlamaV2.forward` does, as far as they go."""

    def __init__(self, device: int, modules: Sequence[Any]) -> None:
        self.device, self.modules = device, modules
        for module in modules:
            module.set_device_idx(device)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Token ids [rows, tokens] or states [rows, tokens, hidden] in the CPU's memory to states there.

        States travel by pinned memory, so that no GPU waits for another. All is in the default stream, for the
        library's kernels are in no other.
        """
        import torch
        from exllamav2.attn import ExLlamaV2Attention

        rows, tokens = inputs.shape[:2]
        params = ExLlamaV2Attention.Params(rows, tokens, 0)
        with torch.inference_mode(), torch.cuda.device(self.device):
            states = inputs.to(self.modules[0].device(), non_blocking=True)
            for module in self.modules:
                states = module.forward(states, cache=None, attn_params=params, past_len=0)
            states = states.to("cpu", non_blocking=True)
            if self.device != CPU:
                torch.cuda.current_stream().synchronize()
        return states

    def load(self, module: Any) -> None:
        """Load one of the modules."""
        import torch

        with torch.inference_mode(), torch.cuda.device(self.device):
            module.load()


def read_head(teacher: config.Teacher) -> TeacherHead:
    """The final norm, as float32 because exllamav2 rounds behind it, and the dequantized output head, float16.

    Nothing else is loaded.
    """
    folder, model = _model(teacher, longest=1)
    norm, head = model.modules[model.head_layer_idx - 1 :]
    _load(model, [Stage(0, [norm, head])], f"loading the head of {folder.name}")
    weight = head.get_weight_tensor_dq().half().T[: model.config.vocab_size]  # rows beyond it are padding
    return TeacherHead(norm.weight.data.float(), weight, model.config.norm_eps)


def _model(teacher: config.Teacher, longest: int) -> tuple[Path, Any]:
    """The library's model, of which nothing is loaded yet, for questions of at most `longest` tokens."""
    library = _library(teacher)
    folder = model_folder(teacher.model)
    check_folder(folder, "exllamav2")
    settings = library.ExLlamaV2Config(str(folder))
    if longest > settings.max_seq_len:
        raise UserError(f"{folder}: reads {settings.max_seq_len} tokens, and a question has {longest}; shorten it")
    # Together they bound one forward and its scratch memory.
    settings.max_batch_size, settings.max_input_len = teacher.batch_rows, max(longest, SHORTEST_BUFFER)
    settings.max_dq_size = max(settings.max_dq_size, settings.hidden_size * settings.intermediate_size)
    return folder, library.ExLlamaV2(settings)


def _load(model: Any, stages: Sequence[Stage], what: str) -> None:
    """Load the modules of all stages, each stage's in a thread of its own."""
    import torch
    from exllamav2.fasttensors import cleanup_stfiles

    modules = [module for stage in stages for module in stage.modules]
    scratch = max(module.scratch_space_fixed() for module in modules)
    model.create_device_tensors([scratch] * torch.cuda.device_count())
    with threads(len(stages)) as own, progress((), what, "module", len(modules)) as bar:
        jobs = [
            thread.submit(stage.load, module)
            for thread, stage in zip(own, stages, strict=True)
            for module in stage.modules
        ]
        for job in as_completed(jobs):
            job.result()
            bar.update()
    cleanup_stfiles()
    torch.cuda.empty_cache()


def _holdings(stages: Sequence[Stage]) -> str:
    """What each GPU holds, and what it has left, for a person."""
    import torch

    held = []
    for gpu in (stage.device for stage in stages if stage.device != CPU):
        holds, left = torch.cuda.memory_allocated(gpu) / GIB, torch.cuda.mem_get_info(gpu)[0] / GIB
        held.append(f"GPU {gpu} holds {holds:.1f} GiB and has {left:.1f} left")
    return ", ".join(held)


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
