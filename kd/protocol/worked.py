"""The worked example of docs/protocol.md, token by token: `python -m kd.protocol.worked` prints it."""

from __future__ import annotations

import json
from typing import Any

from kd.config import BundledModel, Protocol
from kd.data.rows import Example
from kd.models.load import load_tokenizer, model_folder
from kd.paper import PROMPTS
from kd.protocol.alignment import Match, match_examples
from kd.protocol.reading import teacher_reading

# The first row of GSM8K's training split (MIT).
QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
ANSWER = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)
EXAMPLE = Example("train-00001", QUESTION, ANSWER, ANSWER)
HEADER = ("row", "student has read …", "and is to say", *(f"teacher ({prompt}) has read …" for prompt in PROMPTS))


def worked_example(tokenizer: Any, protocol: Protocol, example: Example = EXAMPLE) -> str:
    """A Markdown table: each matched row by the last token that student and teacher have read before it, and its label;
    one column for each prompt's teacher."""
    readings = {prompt: teacher_reading(tokenizer, protocol, text, example) for prompt, text in PROMPTS.items()}
    matches = {
        prompt: match_examples(protocol, [example], tokenizer, 256, [reading]).kept[0]
        for prompt, reading in readings.items()
    }
    longest: Match = max(matches.values(), key=lambda match: len(match.labels))
    lines = [HEADER, ("---",) * len(HEADER)]
    for i, label in enumerate(longest.labels):
        read = [
            _shown(tokenizer, reading.token_ids[reading.span[0] + i]) if i < len(matches[prompt].labels) else ""
            for prompt, reading in readings.items()
        ]
        student = longest.input_ids[longest.first_row + i]
        lines.append((str(i), _shown(tokenizer, student), _shown(tokenizer, label), *read))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(tokenizer: Any, token: int) -> str:
    """A token as code in a Markdown table."""
    return f"`{json.dumps(tokenizer.decode([token]), ensure_ascii=False)[1:-1]}`".replace("|", "\\|")


if __name__ == "__main__":
    bundled = load_tokenizer(model_folder(BundledModel(source="bundled")))
    print(f"### `published`\n\n{worked_example(bundled, 'published')}")
    print(f"### `aligned`\n\n{worked_example(bundled, 'aligned')}")
