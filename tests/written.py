"""What students of a made-up assessment wrote, some of it hostile to a page that shows it."""

from __future__ import annotations

HOSTILE = (
    "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'><svg onload='attacked = 1'>"
    "<!-- {{packed}} \\u003c ]]> \x00 \u202e \u2028 <style>body{display:none}</style><a href='javascript:attacked=1'>"
)
SMILE = "\N{GRINNING FACE}"  # two UTF-16 units


def word(row: int) -> str:
    """A word that no other row has, without a digit."""
    return "row-" + "".join("abcdefghij"[int(digit)] for digit in str(row))


def response(experiment: int, row: int) -> str:
    """What an experiment answers to a question whose answer is row + 2."""
    match row:
        case 0:
            return f"{HOSTILE} so \\boxed{{{2 if experiment == 3 else 1}}}"
        case 1:
            return f"{SMILE * 3} I think that the answer is 3 {SMILE}"
        case 2:
            return "I cannot say."
    right = (row * 7) % 10 < experiment
    return f"Take {row} and 200.\n\nThat makes {row + 2 if right else 99}, in the way of {word(row)}."
