"""Whose teacher rows the original's training loop met."""

from __future__ import annotations


def published_teacher_order(ids: list[str]) -> list[str]:
    """The ids whose teacher rows the original's training loop met, in its order.

    It iterated over `safe_open(...).keys()`, which sorts "Question 1", "Question 10", "Question 100", … as text,
    so of 2638 questions only the first met its own rows.
    """
    as_text = sorted(range(len(ids)), key=lambda i: f"Question {i + 1}")
    return [ids[i] for i in as_text]
