"""One prompt being continued, as every way of decoding keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field

NAN_TOKEN = -1  # where the logits hold one
NOT_A_NUMBER = "its logits are not numbers (NaN)"


@dataclass
class Row:
    """One prompt being continued by at most `limit` tokens; `failure` says why it could not be."""

    index: int
    prompt: list[int]
    limit: int
    new: list[int] = field(default_factory=list)
    failure: str | None = None

    @property
    def position(self) -> int:
        """Where its newest token stands, which the next step reads."""
        return len(self.prompt) + len(self.new) - 1

    def add(self, token: int) -> None:
        """One more token, or the mark that there is none."""
        if token == NAN_TOKEN:
            self.failure = NOT_A_NUMBER
        else:
            self.new.append(token)
