"""docs/errata.md: the findings that the published algorithms show by themselves, on real files and a real row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kd.config import BundledModel
from kd.data.rows import Example
from kd.models.load import load_model, load_tokenizer, model_folder
from kd.paper import PROMPTS
from kd.protocol.alignment import match_examples
from kd.protocol.order import published_teacher_order
from kd.protocol.reading import student_token_ids, teacher_reading
from kd.protocol.worked import ANSWER, EXAMPLE, QUESTION


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(model_folder(BundledModel(source="bundled")))


def test_keys_of_a_real_file_come_in_text_order(tmp_path: Path) -> None:
    names = [f"Question {i}" for i in range(1, 2639)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "logits.safetensors")
    with safe_open(tmp_path / "logits.safetensors", "pt") as file:
        keys = list(file.keys())
    assert keys[:4] == ["Question 1", "Question 10", "Question 100", "Question 1000"]
    assert published_teacher_order(names) == keys
    assert [name for name, key in zip(names, keys, strict=True) if name == key] == ["Question 1"]


def test_published_rows_are_unshifted_and_offset(tokenizer: Any) -> None:
    readings = [teacher_reading(tokenizer, "published", PROMPTS[prompt], EXAMPLE) for prompt in ("base", "teacher")]
    base, primed = (reading.token_ids for reading in readings)
    (match,) = match_examples("published", [EXAMPLE], tokenizer, 256, readings[:1]).kept
    question, answer = student_token_ids(tokenizer, QUESTION), student_token_ids(tokenizer, ANSWER)
    # 5: the student reads the question alone, and its row i meets token i of the answer, not the token that follows.
    assert match.input_ids == question
    assert match.labels == answer[: len(match.labels)]
    words = [tokenizer.decode([token]) for token in match.labels[:8]]
    following = [tokenizer.decode([token]) for token in question[1:9]]
    assert words == ["<|im_start|>", "N", "atal", "ia", " sold", " ", "4", "8"]
    assert following == ["N", "atal", "ia", " sold", " clips", " to", " ", "4"]
    # 6: the teacher's row i has read one token more.
    assert base == question[1:]
    # 7: a primed teacher's rows start with the prompt's; its last space joins the first word, cut " Natal" + "ia" then.
    assert [tokenizer.decode([token]) for token in primed[25:28]] == [".", " Natal", "ia"]
    assert [tokenizer.decode([token]) for token in base[:3]] == ["N", "atal", "ia"]
    assert primed[28:] == base[3:]
    other = Example("train-00002", "Why?", ANSWER, ANSWER)
    assert teacher_reading(tokenizer, "published", PROMPTS["teacher"], other).token_ids[:26] == primed[:26]


def test_learning_rate_falls_to_zero_and_climbs_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=5e-6)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2638)
    rates = []
    for _ in range(5276):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 5e-6
    assert rates[2638] == pytest.approx(0, abs=1e-12)
    assert rates[-1] == pytest.approx(5e-6, rel=1e-4)


def test_added_pad_token_is_out_of_range(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    model = load_model(tiny_llama, "float32", "cpu")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == model.get_input_embeddings().num_embeddings
    with pytest.raises(IndexError):
        model(torch.tensor([[tokenizer.pad_token_id]]))
