"""What a way of keeping a teacher loses, on a teacher and a student of random numbers."""

from __future__ import annotations

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from kd.analysis.formats import Error, in_eight_bits, objective_errors, of_largest
from kd.config import Distill, load_config
from kd.distill.objective import Teacher
from kd.store.head import NoHead, TeacherHead
from kd.teacher.distillkit import largest

ROWS, HIDDEN, VOCABULARY = 12, 32, 500


@pytest.fixture(scope="module")
def settings() -> Distill:
    return load_config(REPOSITORY / "profiles" / "paper.yaml").distill


def errors(settings: Distill, temperature: float, divergence: str = "reverse-kl") -> dict[str, Error]:
    """Those of several ways of keeping one teacher; some of it is like the student, as a teacher is."""
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN)
    states = torch.randn(ROWS, HIDDEN)
    head, hidden = TeacherHead(torch.ones(HIDDEN), weight, 1e-5), states + 0.3 * torch.randn(ROWS, HIDDEN)
    logits = head.logits(states)
    kept = {
        "itself": Teacher(head, states),
        "its logits": Teacher(NoHead(VOCABULARY), logits),
        "float16": Teacher(head, states.half()),
        "bfloat16": Teacher(head, states.bfloat16()),
        "8 bits": Teacher(head, in_eight_bits(states, HIDDEN)),
    }
    share = divergence == "reverse-kl"
    kept |= {f"{k}": of_largest(*largest(logits, k), VOCABULARY, share_rest=share) for k in (8, 32, 128, VOCABULARY)}
    changed = settings.model_copy(update={"temperature": temperature, "divergence": divergence})
    labels = torch.randint(VOCABULARY, (ROWS,))
    found = objective_errors(hidden, weight, labels, Teacher(head, states), kept, changed)
    assert objective_errors(hidden, weight, labels, Teacher(head, states), kept, changed) == found  # nothing is spoiled
    return found


@pytest.mark.parametrize("temperature", [1.0, 5.942267335064758])
def test_less_precision_loses_more_and_none_loses_nothing(settings: Distill, temperature: float) -> None:
    found = errors(settings, temperature)
    assert found["itself"] == Error(0, 0)
    for whole in ("its logits", str(VOCABULARY)):
        assert max(found[whole]) < 1e-4
    assert 0 < found["float16"].gradient < found["bfloat16"].gradient < found["8 bits"].gradient < 0.1


def test_the_largest_lose_more_the_hotter_the_objective(settings: Distill) -> None:
    mild, hot = errors(settings, 1.0), errors(settings, settings.temperature)
    assert mild["8"].objective > mild["32"].objective > mild["128"].objective
    for k in ("8", "32", "128"):
        assert hot[k].objective > 10 * mild[k].objective
    without_rest = errors(settings, 1.0, "forward-kl")
    assert without_rest["8"].gradient > without_rest["128"].gradient > 0


def test_what_comes_back_of_the_largest_is_what_distillkit_makes_of_them() -> None:
    reason = "DistillKit is not installed; a clone of arcee-ai/DistillKit on PYTHONPATH is enough"
    densify = pytest.importorskip("distillkit.compression.densify", reason=reason).densify
    missing = pytest.importorskip("distillkit.missing_probability", reason=reason).MissingProbabilityHandling
    torch.manual_seed(0)
    for scale in (1.0, 30.0):  # the second leaves nearly nothing to the rest
        ids, values = largest(scale * torch.randn(ROWS, VOCABULARY), 32)
        shared = of_largest(ids, values, VOCABULARY, share_rest=True).states
        assert torch.allclose(shared, densify(ids, values, VOCABULARY, missing=missing.SYMMETRIC_UNIFORM), atol=1e-4)
        zero = of_largest(ids, values, VOCABULARY, share_rest=False).states.softmax(-1)
        assert torch.allclose(zero, densify(ids, values, VOCABULARY, missing=missing.ZERO).softmax(-1))


@given(st.integers(0, 2**16), st.sampled_from([4, 8, 32]), st.floats(-6, 4))
def test_eight_bits_are_off_by_half_a_step_at_most(seed: int, group: int, exponent: float) -> None:
    states = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    groups = states.unflatten(-1, (-1, group)).abs().amax(-1).repeat_interleave(group, 1)
    off = (in_eight_bits(states, group) - states).abs()
    # A scale in float16 is a thousandth off, and no smaller than its least normal number.
    assert (off <= groups / 127 * 0.5 + groups * 1e-3 + 2**-14).all()
    assert torch.equal(in_eight_bits(torch.zeros(2, HIDDEN), group), torch.zeros(2, HIDDEN))
