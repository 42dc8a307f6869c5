"""docs/protocol.md shows what the code does."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from kd.config import BundledModel, Protocol
from kd.models.load import load_tokenizer, model_folder
from kd.protocol.worked import worked_example

PAGE = Path(__file__).parent.parent.parent / "docs" / "protocol.md"


@pytest.mark.parametrize("protocol", get_args(Protocol))
def test_the_page_has_the_worked_example(protocol: Protocol) -> None:
    tokenizer = load_tokenizer(model_folder(BundledModel(source="bundled")))
    assert f"### `{protocol}`\n\n{worked_example(tokenizer, protocol)}" in PAGE.read_text(encoding="utf-8")
