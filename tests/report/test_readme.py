"""The README's picture of two protocols."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kd.report.readme import main

CONTROL = "no-distillation-matched"


def document(protocol: str, **accuracies: float) -> dict[str, Any]:
    """A results document, as far as the picture reads it."""
    experiments = {
        name: {
            "trained": "distillation" not in name,
            "accuracy": share,
            "interval": [0.9 * share, 1.1 * share],
            "collapsed": [],
            "against_control": None if name == CONTROL else {"asked_alike": name != "no-distillation"},
        }
        for name, share in {"no-distillation": 0.05, **accuracies, CONTROL: 0.06}.items()
    }
    about = {"profile": protocol, "protocol": protocol, "control": CONTROL, "differs_from_paper": []}
    return about | {"experiments": experiments}


def draw(folder: Path, *documents: dict[str, Any], status: int = 0) -> Path:
    paths = [folder / f"{place}.json" for place in range(len(documents))]
    for path, one in zip(paths, documents, strict=True):
        path.write_text(json.dumps(one))
    assert main([*map(str, paths), str(folder / "mini.svg")]) == status
    return folder / "mini.svg"


def test_both_protocols_stand_side_by_side_the_control_first_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    both = [document(name, tuned=share) for name, share in (("aligned", 0.4), ("published", 0.07))]
    drawn = draw(tmp_path, *both)
    first = drawn.read_bytes()
    assert draw(tmp_path, *both).read_bytes() == first
    texts = [element.text for element in ElementTree.fromstring(first).iter() if element.tag.endswith("text")]
    for said in ("As the method says (aligned)", "As the paper did it (published)", "40.0%", "7.0%", "95 % interval"):
        assert said in texts
    names = [text for text in texts if text in ("untrained, asked", "the same way", "another way", "tuned")]
    assert names == ["untrained, asked", "the same way", "untrained, asked", "another way", "tuned"]
    assert b"prefers-color-scheme:dark" in first  # an <img> inherits no colour from its page
    assert b"href=" not in first.replace(b'href="#', b"")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([document("aligned", tuned=0.4), document("aligned", tuned=0.4)], "both results are of protocol aligned"),
        ([document("aligned", tuned=0.4), document("published", other=0.4)], "give the results of profiles with"),
        ([document("aligned", tuned=0.4), {"study": "another"}], "1.json: not a results.json of `kd report`"),
    ],
)  # fmt: skip
def test_results_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[dict[str, Any]], message: str
) -> None:
    assert draw(tmp_path, *others, status=2).exists() is False
    assert message in capsys.readouterr().err
