"""What the paper reports and asked: its prompts, its table, its check losses. Facts alone."""

from __future__ import annotations

from dataclasses import dataclass

TEST_ROWS = 1319


@dataclass(frozen=True)
class PublishedResult:
    """One row of the published table: its name there, the accuracy printed (percent), the count behind it."""

    name: str
    accuracy: float
    correct: int


RESULTS: dict[str, PublishedResult] = {
    "no-distillation": PublishedResult("No-distillation (control)", 12.20, 161),
    "fine-tuning": PublishedResult("Fine-tuning (control)", 25.01, 303),
    "base-kd": PublishedResult("Base-KD", 30.62, 404),
    "confidence-kd": PublishedResult("Confidence-KD", 34.04, 499),
    "teacher-kd": PublishedResult("Teacher-KD", 42.30, 558),
    "ground-truth-kd": PublishedResult("Ground truth-KD", 48.14, 635),
}

# The teacher's mean largest next-token probability behind a prompt (assessment/prob-stats.ipynb).
MEAN_MAX_PROBABILITY = {"base": 0.573, "confidence": 0.5205}
# Mean cross entropy over the socratic test split after training, misaligned as in training; none for base-kd.
CHECK_LOSSES = {"fine-tuning": 8.879, "confidence-kd": 10.740, "teacher-kd": 10.402, "ground-truth-kd": 11.069}

# Put before the question with no separator but their own final space (llama-3.1-405b-6bpw/inference_gsm8k*.ipynb;
# experimental stimuli, verbatim).
PROMPTS: dict[str, str] = {
    "base": "",
    "confidence": "(At the end of the question) Briefly double-check that your answer is correct once done. ",
    "teacher": (
        "As a teacher, guide your student through solving the question below. "
        "Provide a clear, simple explanation for someone unfamiliar with the problem. "
    ),
    "ground-truth": (
        "As a smart language model, provide a detailed answer that is clear and feasible "
        "for smaller models to understand and learn from without losing too much detail. "
    ),
}

# The experiment that these figures belong to: its data, models, and settings (llama-3.1-405b-6bpw/, distillation/).
DATASET, TRAIN_ANSWERS, TRAIN_ROWS = "openai/gsm8k", "socratic", 2638
TEACHER = "ek826/Meta-Llama-3.1-405B-Instruct-6.0bpw-exl2"
STUDENTS = ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")  # one model, renamed
TRAINING: dict[str, object] = {
    "protocol": "published",
    "temperature": 5.942267335064758,
    "alpha": 0.6093348343631224,
    "divergence": "reverse-kl",
    "epochs": 2,
    "batch_rows": 1,
    "max_tokens": 256,
    "learning_rate": 5e-6,
    "momentum": 0.9,
    "weight_decay": 1e-2,
    "cosine_steps": TRAIN_ROWS,
    "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
DROPOUT = {"base-kd": 0.2}  # of the published adapters; all others have 0.1
CONTROL, SUFFIX = "no-distillation", "\n Please respond with just the answer. The answer is:"
LIMIT, CONTROL_LIMIT = 350, 50  # new tokens, of the control alone the second
