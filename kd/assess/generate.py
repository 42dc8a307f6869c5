"""Greedy answers of a student to the test questions, in batches sorted by length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd import models
from kd.distill.alignment import student_token_ids
from kd.errors import UserError
from kd.files import read_json
from kd.progress import progress, show_state

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from tqdm import tqdm


@dataclass(frozen=True)
class Response:
    """What a student wrote: text without the prompt, its length in tokens, and whether it ran into the limit."""

    text: str
    tokens: int
    reached_limit: bool


def load_student(folder: Path, dtype: Any, adapter: Path | None, base_name: str, device: str) -> Any:
    """The student, with an adapter merged into its weights in memory where one is given."""
    model = models.load_model(folder, dtype, device)
    if adapter is None:
        return model
    from peft import PeftModel

    trained_on = read_json(adapter / "adapter_config.json", "an adapter").get("base_model_name_or_path")
    if trained_on != base_name:
        raise UserError(f"{adapter}: an adapter for {trained_on}, not for the student {base_name}; train it again")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def respond(
    student: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_rows: int, what: str
) -> list[Response]:
    """Continue every prompt greedily until an end token or `max_new_tokens`; responses in the prompts' order."""
    token_ids = [student_token_ids(tokenizer, prompt) for prompt in prompts]
    # Rows of like length share a batch, so little is padding; the longest first, so memory peaks at the start.
    order = sorted(range(len(prompts)), key=lambda i: (-len(token_ids[i]), i))
    responses: dict[int, Response] = {}
    with progress((), what, "question", total=len(prompts)) as bar:
        for start in range(0, len(order), batch_rows):
            rows = order[start : start + batch_rows]
            batch = _batch(student, tokenizer, [token_ids[i] for i in rows], max_new_tokens, bar)
            responses.update(zip(rows, batch, strict=True))
            bar.update(len(rows))
    return [responses[i] for i in range(len(prompts))]


def _batch(
    student: Any, tokenizer: Any, token_ids: list[list[int]], max_new_tokens: int, bar: tqdm[Any]
) -> list[Response]:
    import torch

    def show_step(ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """Called after each token; never stops a row, but says where a long batch stands."""
        show_state(bar, f"token {ids.shape[1] - input_ids.shape[1]} of {max_new_tokens}")
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ends = student.generation_config.eos_token_id
    end_ids = ends if isinstance(ends, list) else [ends]
    input_ids, mask = _pad_left(token_ids, end_ids[0], student.device)
    with torch.inference_mode():
        output = student.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            pad_token_id=end_ids[0],
            stopping_criteria=[show_step],
        )
    return [_response(tokenizer, row, end_ids, max_new_tokens) for row in output[:, input_ids.shape[1] :].tolist()]


def _pad_left(rows: list[list[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [rows, longest]; the padding comes first and is masked."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _response(tokenizer: Any, new_ids: list[int], end_ids: list[int], max_new_tokens: int) -> Response:
    """Cut a generated row behind its first end token; what follows is padding."""
    ended = next((i for i, token in enumerate(new_ids) if token in end_ids), None)
    kept = new_ids if ended is None else new_ids[: ended + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Response(text, len(kept), ended is None and len(kept) == max_new_tokens)
