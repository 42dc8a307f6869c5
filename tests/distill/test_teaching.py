"""`aligned` teaches and shuffled rows do not: SmolLM2, a minute or two, run by `pytest -m teaching -s`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kd.config import load_config
from kd.data import miniature
from kd.data.rows import Example
from kd.distill.adapter import add_lora
from kd.distill.step import States, make_step
from kd.distill.train import descend, evaluate
from kd.models.load import load_model, load_tokenizer, model_folder
from kd.paper import PROMPTS
from kd.protocol.alignment import match_examples
from kd.protocol.reading import teacher_reading
from kd.teacher.backends.transformers import TransformersTeacher

CONFIG = load_config(Path(__file__).parent.parent.parent / "profiles" / "mini.yaml")
TRAINED, HELD_OUT, EPOCHS = 10, 5, 3
REMOVED = (12, 13, 14, 15)  # of the student's 30 layers, so that there is something to learn
# The teacher's share is nine tenths, so that its rows and not the labels decide; one epoch at a time, a constant rate.
SETTINGS = CONFIG.distill.model_copy(
    update={
        "protocol": "aligned",
        "alpha": 0.1,
        "learning_rate": 0.05,
        "batch_rows": 2,
        "epochs": 1,
        "cosine_steps": 10**9,
    }
)


@pytest.mark.teaching
def test_held_out_losses_fall_over_epochs_and_do_not_with_shuffled_rows() -> None:
    problems = miniature.problems(TRAINED + HELD_OUT, CONFIG.seed)
    examples = [Example(f"train-{i:05d}", p.question, "", p.socratic_answer) for i, p in enumerate(problems, start=1)]
    tokenizer = load_tokenizer(model_folder(CONFIG.teacher.model))
    teacher = TransformersTeacher(CONFIG.teacher)
    states, stored = {}, []
    for example in examples:
        reading = teacher_reading(tokenizer, "aligned", PROMPTS["teacher"], example)
        states[example.id] = teacher.forward([reading.token_ids])[0][slice(*reading.span)].half()
        stored.append(reading)
    matches = match_examples("aligned", examples, tokenizer, SETTINGS.max_tokens, stored).kept

    def losses(rows: States) -> list[tuple[float, float]]:
        """Cross entropy and divergence from the teacher on the held-out examples, before and after each epoch."""
        torch.manual_seed(CONFIG.seed)
        base = load_model(model_folder(CONFIG.student.model), "float32", "cpu")
        kept = [layer for i, layer in enumerate(base.model.layers) if i not in REMOVED]
        base.model.layers = torch.nn.ModuleList(kept)
        student = add_lora(base, CONFIG, 0.1).train()
        step = make_step(student, teacher.head(), SETTINGS)
        seen = []
        for epoch in range(EPOCHS + 1):
            if epoch:
                list(descend(step, matches[:TRAINED], rows, SETTINGS))
            loss = evaluate(student.get_base_model(), matches[TRAINED:], states.__getitem__, teacher.head(), SETTINGS)
            seen.append((float(loss.cross_entropy), float(loss.divergence)))
        return seen

    taught, misled = losses(states.__getitem__), losses(shuffled(states, TRAINED).__getitem__)
    print("\n| epochs | cross entropy | divergence | with shuffled rows | divergence |\n|---|---|---|---|---|")
    for epoch, (right, wrong) in enumerate(zip(taught, misled, strict=True)):
        print(f"| {epoch} | {right[0]:.3f} | {right[1]:.4f} | {wrong[0]:.3f} | {wrong[1]:.4f} |")
    for part in (0, 1):
        assert all(later[part] < earlier[part] for earlier, later in pairwise(taught))
        assert not all(later[part] < earlier[part] for earlier, later in pairwise(misled))
        assert misled[-1][part] > taught[-1][part]


def shuffled(states: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The rows of the first `count` examples in random order, in the examples' lengths."""
    own = dict(list(states.items())[:count])
    rows = torch.cat(list(own.values()))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return dict(zip(own, rows[order].split([len(piece) for piece in own.values()]), strict=True))
