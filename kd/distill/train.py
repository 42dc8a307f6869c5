"""LoRA-tune the student on matched rows: batches of one, SGD with momentum, cosine annealing, as published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd import models
from kd.config import Config, Distill
from kd.dataset import read_examples
from kd.distill.alignment import Match, published_matches
from kd.distill.objective import Loss, distillation_loss
from kd.errors import UserError
from kd.files import whole_folder, write_text
from kd.progress import progress
from kd.teacher.capture import open_checked
from kd.teacher.store import TeacherStore

LOSS_FOLDER = "loss"


def train(config: Config, experiment: str) -> None:
    """Train one adapter and write it, with its loss curve, to artifacts/<profile>/adapters/<experiment>."""
    adapter = config.adapters[experiment]
    examples = read_examples(config.artifacts / "data" / "train.jsonl")
    student_folder = models.model_folder(config.student.model)
    tokenizer = models.load_tokenizer(student_folder)
    store = open_checked(config, adapter.prompt, tokenizer, examples) if adapter.prompt else None
    lengths = {e.id: len(e.token_ids) for e in store.manifest.examples} if store else None
    matches = published_matches(examples, tokenizer, config.distill.max_tokens, lengths)

    device = models.default_device()
    make_deterministic(config.seed)
    base = models.load_model(student_folder, config.student.dtype, device)
    if store:
        _check_vocabulary(base, store)
    student = add_lora(base, config, adapter.dropout)
    with whole_folder(config.artifacts / "adapters" / experiment) as work:
        descend(student, matches, store, config.distill, device, experiment, work / LOSS_FOLDER)
        save_adapter(student, config, experiment, work)


def make_deterministic(seed: int) -> None:
    """One seed for LoRA's initialisation and dropout; the same bits on the same machine."""
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())


def add_lora(base: Any, config: Config, dropout: float) -> Any:
    """The student with a fresh adapter on its attention projections; only the adapter is trained."""
    from peft import LoraConfig, get_peft_model

    lora = config.distill.lora
    base.name_or_path = models.model_name(config.student.model)
    return get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=dropout,
            target_modules=lora.target_modules,
            revision=getattr(config.student.model, "revision", None),
        ),
    )


def descend(
    student: Any,
    matches: list[Match],
    store: TeacherStore | None,
    settings: Distill,
    device: str,
    experiment: str,
    loss_folder: Path,
) -> None:
    """The published loop: for each epoch and example one update and one scheduler step."""
    import torch
    from dvclive import Live

    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    # T_max counts one epoch of the two, so the rate falls to 0 and climbs back.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.cosine_steps)
    if store:
        store.head = store.head.to(device)
    student.train()
    with Live(str(loss_folder), save_dvc_exp=False, dvcyaml=None, monitor_system=False) as live:
        bar = progress(
            _epochs(matches, settings.epochs), f"train, {experiment}", "step", settings.epochs * len(matches)
        )
        for match in bar:
            loss = step_loss(student, match, store, settings, device)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            _log(live, loss, scheduler.get_last_lr()[0], match)
            scheduler.step()
            bar.set_postfix_str(f"loss {float(loss.total):.3f}", refresh=False)


def step_loss(student: Any, match: Match, store: TeacherStore | None, settings: Distill, device: str) -> Loss:
    """The objective for one example."""
    import torch

    rows = len(match.labels)
    logits = student(torch.tensor([match.input_ids], device=device), use_cache=False).logits[0, :rows]
    labels = torch.tensor(match.labels, device=device)
    teacher = store.logits(match.teacher_id)[:rows] if store and match.teacher_id else None
    return distillation_loss(logits, labels, teacher, settings.alpha, settings.temperature)


def save_adapter(student: Any, config: Config, experiment: str, folder: Path) -> None:
    """PEFT's own format, the same bytes each time, with a card that says what the adapter is."""
    for adapter in student.peft_config.values():
        adapter.target_modules = sorted(adapter.target_modules)  # PEFT keeps a set, whose order changes by process
    # "auto" would ask the Hub whether the base model's vocabulary was resized; it never is here.
    student.save_pretrained(folder, save_embedding_layers=False)
    write_text(folder / "README.md", _card(config, experiment))


def _epochs(matches: list[Match], epochs: int) -> Iterator[Match]:
    for _ in range(epochs):
        yield from matches


def _log(live: Any, loss: Loss, learning_rate: float, match: Match) -> None:
    total = float(loss.total)
    if not math.isfinite(total):
        raise UserError(f"{match.example_id}: the loss became {total}; lower `distill.learning_rate`")
    live.log_metric("loss", total)
    live.log_metric("cross_entropy", float(loss.cross_entropy))
    if loss.divergence is not None:
        live.log_metric("divergence", float(loss.divergence))
    live.log_metric("learning_rate", learning_rate)
    live.next_step()


def _check_vocabulary(student: Any, store: TeacherStore) -> None:
    teacher_size, student_size = store.head.vocabulary_size, student.config.vocab_size
    if teacher_size != student_size:
        raise UserError(
            f"{store.folder}: the teacher has {teacher_size} logits, the student {student_size}; "
            "choose a teacher and a student with one vocabulary"
        )


def _card(config: Config, experiment: str) -> str:
    adapter, settings = config.adapters[experiment], config.distill
    base = models.model_name(config.student.model)
    source = f"teacher store `{adapter.needs}`" if adapter.prompt else "labels alone (no teacher)"
    llama = "\nBuilt with Llama.\n" if "llama-3" in base.lower() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"""---
base_model: {base}
library_name: peft
---
# {experiment}

A LoRA adapter of {base}, trained by `kd train {experiment}` (profile {config.profile}).
{llama}
- learns from: {source}
- data: {config.dataset.train_rows} rows, {config.dataset.source}, {config.dataset.answers} answers
- protocol: {settings.protocol}, T {settings.temperature}, alpha {settings.alpha}, {settings.epochs} epochs
- seed: {config.seed}
- versions: {versions}
"""
