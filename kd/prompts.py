"""The response-priming prompts, put before the question with no separator but their own final space.

Source: the paper's repository, llama-3.1-405b-6bpw/inference_gsm8k*.ipynb (experimental stimuli, verbatim).
"""

from __future__ import annotations

PROMPTS: dict[str, str] = {
    "base": "",
    "teacher": (
        "As a teacher, guide your student through solving the question below. "
        "Provide a clear, simple explanation for someone unfamiliar with the problem. "
    ),
    "ground-truth": (
        "As a smart language model, provide a detailed answer that is clear and feasible "
        "for smaller models to understand and learn from without losing too much detail. "
    ),
    "confidence": "(At the end of the question) Briefly double-check that your answer is correct once done. ",
}


def primed(prompt: str, question: str) -> str:
    """What the teacher reads: the prompt's text, then the question."""
    return PROMPTS[prompt] + question
