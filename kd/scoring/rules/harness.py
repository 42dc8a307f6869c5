"""lm-evaluation-harness's filters of its GSM8K tasks, for comparison, as in its repository at commit 4e7e0d4.

That is version 0.4.13.dev0: the strict and the flexible filter of its task gsm8k (3.0) and the strict one of
gsm8k_cot_llama (4.0), which is for Llama's chat models. A response ends at the task's stop strings, where the harness
stops generating. The harness compares text, not numbers, after taking out commas, dollar signs and a final point:
"18.00" is not "18". So these answers keep the response's spelling.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from kd.scoring.rules.number import from_near_the_end
from kd.scoring.rules.rule import Extraction, Found, Rule, RuleSet, in_order

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = r"-?[$0-9.,]{2,}|-?[0-9]+"
_LLAMA = re.compile(rf"The final answer is ({_NUMBER})")
_FLEXIBLE = re.compile(_NUMBER)
_IGNORED = str.maketrans("", "", ",$")

_STOPS = ("Question:", "</s>", "<|im_end|>")
_LLAMA_STOPS = ("<|eot_id|>", "<|start_header_id|>user<|end_header_id|>", "Q:", "</s>", "<|im_end|>")


def strict_match(response: str) -> Found | None:
    """gsm8k: the first number behind "#### "."""
    match = _STRICT.search(response)
    return _found(match, 1) if match else None


def llama_match(response: str) -> Found | None:
    """gsm8k_cot_llama: the last number behind "The final answer is "."""
    last = deque(_LLAMA.finditer(response), maxlen=1)
    return _found(last[0], 1) if last else None


def flexible_extract(response: str) -> Found | None:
    """The last run of two or more digits, points, commas and dollar signs, or single digit."""
    for start in from_near_the_end(response):
        last = deque(_FLEXIBLE.finditer(response, start), maxlen=1)
        if last:
            return _found(last[0], 0)
    return None


def _found(match: re.Match[str], group: int) -> Found | None:
    answer = match[group].translate(_IGNORED).removesuffix(".")
    return Found(answer, *match.span(group)) if answer else None


def _until(stops: Sequence[str], name: str, rule: Rule) -> RuleSet:
    """The rule set of one rule, which reads each response up to the first of the stop strings."""
    read = in_order({name: rule})

    def rule_set(responses: Iterable[str]) -> Iterator[Extraction]:
        for response in responses:
            ends = [at for at in map(response.find, stops) if at >= 0]
            yield from read([response[: min(ends)] if ends else response])

    return rule_set


strict = _until(_STOPS, "strict-match", strict_match)
flexible = _until(_STOPS, "flexible-extract", flexible_extract)
llama = _until(_LLAMA_STOPS, "llama-match", llama_match)
