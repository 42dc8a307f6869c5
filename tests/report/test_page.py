"""The page's parts without a browser: what is packed into it, what its policy allows, and charts as SVG."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.report import charts
from kd.report.explorer import Question, Responses, pack
from kd.report.page import Section, listing, page, table
from kd.scoring.rules.rule import NOTHING, Extraction

EXPERIMENTS = {
    name: {
        "accuracy": share,
        "interval": (share - 0.01, share + 0.01),
        "published_accuracy": published,
        "trained": name != "a",
    }
    for name, share, published in (("a", 0.2, 0.25), ("b", 0.9, None))
}


def one_chart() -> list[tuple[charts.Chart, str]]:
    return [charts.drawn(charts.accuracy_chart(EXPERIMENTS))]


def unpack(packed: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def drawn() -> list[charts.Chart]:
    return [
        charts.accuracy_chart(EXPERIMENTS),
        charts.loss_chart({"a": [[(step, 9 - step / 100) for step in range(100)]], "b": [[(0, 9.0)]]}),
        charts.agreement_chart({"a": [["1", None]], "b": [["1", None]]}, {"a": [[True, False]], "b": [[True, False]]}),
        charts.rule_set_chart({"a": {"documented": 0.2, "robust": 0.3}, "b": {"documented": 0.4, "robust": 0.4}}),
        charts.length_chart({"a": [1, 2, 300], "b": [50]}, {"a": [False, False, True], "b": [True]}),
    ]


def test_what_is_packed_is_what_was_taken() -> None:
    taken = [Extraction("3", "boxed", (2, 3)), NOTHING, Extraction("5", "answer-is", (0, 1), rows_back=2)]
    responses = Responses(
        ["it 3", "", "so"], [1, 0, 2], [False, True, False], {"r": taken}, {"r": [True, False, False]}
    )
    questions = [Question(f"q{i}", "w", "3") for i in range(3)]
    found = unpack(pack(questions, {"a": {"a": responses}, "b": {"b-1": responses, "b-2": responses}}))
    assert found["experiments"] == ["a", "b-1", "b-2"]
    assert found["students"] == [["a", [0]], ["b", [1, 2]]]
    assert found["questions"][2] == ["q2", "w", "3"]
    assert found["responses"] == [["it 3"] * 3, [""] * 3, ["so"] * 3]
    assert found["cut"] == ["010"] * 3
    one = found["readings"][0][1]
    assert one["answers"] == ["3", None, "5"]
    assert [found["rules"][rule] for rule in one["rules"]] == ["boxed", "undecided", "answer-is"]
    assert (one["spans"], one["back"], one["verdicts"]) == ([[2, 3], None, [0, 1]], {"2": 2}, "ruw")


@given(st.text(), st.text(min_size=1), st.text())
def test_spans_are_counted_as_javascript_counts(before: str, answer: str, behind: str) -> None:
    text = before + answer + behind
    found = Extraction("1", "rule", (len(before), len(before) + len(answer)))
    responses = Responses([text], [1], [False], {"r": [found]}, {"r": [True]})
    packed = unpack(pack([Question("", "", "")], {"a": {"a": responses}}))
    (start, stop), units = packed["readings"][0][0]["spans"][0], text.encode("utf-16-le", "surrogatepass")
    assert units[2 * start : 2 * stop].decode("utf-16-le", "surrogatepass") == answer


class Outline(HTMLParser):
    """The elements of a page: text of style and script, and every attribute that loads or runs something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.policy, self.texts, self.loads, self.open = "", {"style": "", "script": ""}, [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.open = tag
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        loads = [f"{k}={v}" for k, v in attrs if k in ("src", "style", "srcset", "action") or k.startswith("on")]
        self.loads += loads + [v for k, v in attrs if k == "href" and v and not v.startswith("#")]

    def handle_data(self, data: str) -> None:
        if self.open in self.texts:
            self.texts[self.open] = data  # the last script is the page's own

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self.open = ""


def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else() -> None:
    shown = [(chart, charts.svg(chart)) for chart in drawn()]
    results = [Section("R", table([("a", "b"), ("<img src=x>", "1")], "c & d") + listing(["<img src=y>"]))]
    text = page("T", "s", ["<img src=z>"], results, shown, "eJw=", [])
    found = Outline(text)
    assert found.loads == []
    hashes = {k: base64.b64encode(hashlib.sha256(v.encode()).digest()).decode() for k, v in found.texts.items()}
    assert found.policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert all(f"&lt;img src={name}&gt;" in text for name in "xyz")
    assert "{{" not in text.replace("{{packed}}", "")
    assert re.findall(r"https?:", text) == []


@pytest.mark.parametrize("name", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("])
def test_the_script_makes_no_markup_of_data_and_asks_for_nothing(name: str) -> None:
    assert name not in page("", "", [], [], one_chart(), "", [])


def test_a_title_is_not_a_template() -> None:
    assert "<h1>{{packed}} &lt;b&gt;</h1>" in page("{{packed}} <b>", "", [], [], one_chart(), "eJw=", [])


def test_the_page_opens_with_the_first_chart_and_what_it_shows_and_its_headings_go_down_one_at_a_time() -> None:
    shown = [(chart, charts.svg(chart)) for chart in drawn()]
    text = page("T", "s", ["It shows this."], [Section("R", table([("a", "b"), ("c", "1")], "d"))], shown, "eJw=", [])
    order = ["<h1>", "It shows this.", "chart-accuracy", "<table>", "chart-loss", 'id="explorer"']
    assert [text.count(part) for part in order] == [1] * len(order)
    assert sorted(order, key=text.index) == order
    levels = [int(level) for level in re.findall(r"<h([1-6])", text.partition("<script")[0])]
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


def test_the_accuracy_chart_tells_what_is_trained_what_collapsed_and_what_the_paper_printed() -> None:
    experiments = {
        "bare": EXPERIMENTS["a"] | {"trained": False, "collapsed": []},
        "tuned": EXPERIMENTS["b"] | {"trained": True, "collapsed": [1], "runs": [{}]},
        "thrice": EXPERIMENTS["b"] | {"trained": True, "collapsed": [1, 3], "runs": [{}] * 3},
    }
    chart = charts.accuracy_chart(experiments, "bare")
    text = charts.svg(chart)
    for said in ("not trained", "trained", "collapsed, 90.0%", "2 of 3 seeds collapsed", "20.0%", "published"):
        assert f">{said}</text>" in text
    assert "The line: bare." in chart.caption
    assert "Diamonds" in chart.caption
    plain = charts.accuracy_chart({"b": EXPERIMENTS["b"]})
    assert "Diamonds" not in plain.caption
    assert "published" not in charts.svg(plain)


def test_charts_are_the_same_bytes_each_time_and_share_no_ids() -> None:
    first, second = ([charts.svg(chart) for chart in drawn()] for _ in range(2))
    assert first == second
    ids = [element.get("id") for text in first for element in ElementTree.fromstring(text).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for text in first:
        root = ElementTree.fromstring(text)
        assert not any("style" in element.attrib or element.tag == "style" for element in root.iter())
        links = [e.attrib["href"].removeprefix("#") for e in root.iter() if "href" in e.attrib]
        assert {*links, *re.findall(r"url\(#([^)]+)\)", text)} <= set(ids)
        assert charts.INK not in text
        assert "currentColor" in text


def test_every_line_of_a_chart_is_told_apart_without_colour() -> None:
    assert len(charts.COLOURS) == len(charts.MARKERS) == len(charts.LINES) == len(set(map(str, charts.LINES)))
    (axes,) = drawn()[1].figure.axes
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2


def test_a_students_seeds_are_lines_of_one_kind_with_one_name_and_agree_on_average() -> None:
    chart = charts.loss_chart({"a": [[(0, 9.0)], [(0, 8.0)]], "b": [[(0, 7.0)]]})
    (axes,) = chart.figure.axes
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]
    assert "a line for each seed" in chart.caption
    right = {"a": [[True, True], [True, False]], "b": [[True, False]]}
    shares = charts.agreement_chart({"a": [["1", "2"], ["1", "3"]], "b": [["1", "3"]]}, right).figure.axes[0].texts
    assert [share.get_text() for share in shares] == ["75", "75", "50", "50"]  # a, same answer; both right, b
