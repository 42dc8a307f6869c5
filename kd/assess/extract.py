"""The number a response gives as its answer, by a set of rules; what they cannot settle is left to a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kd.assess.rules import harness
from kd.assess.rules.documented import documented
from kd.assess.rules.notebook import notebook
from kd.assess.rules.rule import Extraction, RuleSet

RULE_SETS: dict[str, RuleSet] = {
    "documented": documented,
    "notebook": notebook,
    "lm-eval-strict": harness.strict,
    "lm-eval-flexible": harness.flexible,
}


def extract(responses: Iterable[str], rules: str = "documented") -> Iterator[Extraction]:
    """What the rule set named `rules` takes from each response (without its prompt), in order."""
    return RULE_SETS[rules](responses)
