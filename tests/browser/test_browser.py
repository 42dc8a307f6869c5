"""The report's page in a real browser: what it shows, how it is moved through, and that nothing runs or leaves."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from zipfile import ZipFile

import pytest
from crates import PREVIEW, write_checkout
from rows import prepare_tests
from ruamel.yaml import YAML
from written import response, word

from kd.cli import main
from kd.config import load_config
from kd.scoring.log import log_text

pytest.importorskip("playwright", reason="needs playwright, which the image leaves out")
from playwright.sync_api import Browser, Page, expect, sync_playwright

pytestmark = pytest.mark.browser

REPOSITORY = Path(__file__).parents[2]
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
ROWS = 60
Logs = dict[str, list[dict[str, str]]]
AXE = REPOSITORY / ".nox/npm/node_modules/axe-core/axe.min.js"
PHONE = {"width": 390, "height": 844}


@dataclass
class Opened:
    """A page, and what went wrong on it or left it."""

    page: Page
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def go(self, file: Path, fragment: str = "") -> Page:
        """Open a file and wait until its responses are unpacked."""
        self.page.goto("about:blank")
        self.page.goto(file.as_uri() + fragment)
        self.page.wait_for_selector("#browser:not([hidden])", timeout=20_000)
        return self.page


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Callable[..., Opened]]:
    """Open a page with options of its own (size, colour scheme, script or none)."""
    contexts = []

    def new(**options: Any) -> Opened:
        contexts.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        found = Opened(contexts[-1].new_page())
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.on("pageerror", lambda error: found.problems.append(str(error)))
        found.page.on("console", lambda message: found.problems.append(message.text))
        found.page.on("dialog", lambda dialog: (found.problems.append(dialog.message), dialog.dismiss()))
        return found

    yield new
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`kd report` on small logs, some of whose responses are hostile."""
    folder = tmp_path_factory.mktemp("report")
    params = YAML(typ="safe").load(REPOSITORY / "profiles" / "mini.yaml")
    params["dataset"]["test_rows"] = ROWS
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        examples = prepare_tests(
            (f"How many are {i} and <i>2</i>?", f"They are {i + 2}.\n#### {i + 2}") for i in range(ROWS)
        )
    (folder / "artifacts/mini/logs").mkdir(parents=True)
    YAML().dump(params, folder / "params.yaml")
    for place, (name, settings) in enumerate(load_config(folder / "params.yaml").experiments.items()):
        prompts = [example.question + settings.suffix for example in examples]
        answers = [
            SimpleNamespace(text=f" {response(place, i)}", tokens=9, reached_limit=i % 2 == 0) for i in range(ROWS)
        ]
        text = log_text(examples, prompts, cast(Any, answers))
        (folder / f"artifacts/mini/logs/{name}.csv").write_text(text, encoding="utf-8", newline="")
    adapter = folder / "artifacts/mini/adapters/teacher-kd-1/loss/plots/metrics"
    adapter.mkdir(parents=True)
    (adapter / "loss.tsv").write_text("step\tloss\n" + "".join(f"{i}\t{9 - i / 100}\n" for i in range(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["report"]) == 0
    return folder / "artifacts/mini/report/index.html"


@pytest.fixture(scope="session")
def logs(report_file: Path) -> dict[str, list[dict[str, str]]]:
    """The logs behind it."""
    found = {}
    for name in load_config(report_file.parents[3] / "params.yaml").experiments:
        with (report_file.parents[1] / "logs" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            found[name] = list(csv.DictReader(file))
    return found


@pytest.fixture(scope="session")
def audit_file(published_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`kd audit --output` on the published logs."""
    folder = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["audit", "--data", str(published_logs), "--output", "out"]) == 0
    return folder / "out" / "index.html"


def choose(page: Page, **values: str) -> None:
    for name, label in values.items():
        page.select_option(f"#{name}", label=label)


def count(page: Page) -> int:
    """Questions that pass the filters."""
    return int(page.inner_text("#count").split()[0])


def shown(page: Page) -> str:
    """The heading of the open question."""
    return page.inner_text("#detail h3")


def grave_violations(page: Page) -> list[tuple[str, str]]:
    """What axe finds serious or critical with everything unfolded: the rule and the element."""
    if not AXE.exists():
        pytest.skip("axe-core is not there; `nox -s browser` brings it where npm is installed")
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    page.add_script_tag(path=AXE)
    found: list[dict[str, Any]] = page.evaluate("axe.run().then((found) => found.violations)")
    return [
        (violation["id"], node["html"][:200])
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_tables_and_charts_need_no_script(opened: Callable[..., Any], report_file: Path) -> None:
    page = opened(java_script_enabled=False).page
    page.goto(report_file.as_uri())
    rows = page.locator("#results table").first.locator("tbody tr")
    expect(rows).to_have_count(7)
    ends = {cells[0]: cells[4] for cells in (row.split("\t") for row in rows.all_inner_texts())}
    assert ", " in ends["ground-truth-kd"]  # points, and whether they are a difference
    assert ends["no-distillation-matched"] == "the control"
    expect(page.locator("main > section").first).to_contain_text("five trained students")
    expect(page.locator("main > section").first.locator("#chart-accuracy")).to_be_visible()
    for chart in ("accuracy", "loss", "agreement", "rule-sets", "length"):
        expect(page.locator(f"#chart-{chart} svg")).to_be_visible()
    expect(page.locator("#provenance")).to_contain_text("artifacts/mini/logs/teacher-kd-1.csv")


def test_filters_find_what_the_logs_hold(opened: Callable[..., Any], report_file: Path, logs: Logs) -> None:
    page = opened().go(report_file)
    assert count(page) == 60
    choose(page, wrong="base-kd-1", right="teacher-kd-1")
    both = zip(logs["base-kd-1"], logs["teacher-kd-1"], strict=True)
    wrong = sum(a["correct"] == "False" and a["rule"] != "undecided" and b["correct"] == "True" for a, b in both)
    assert count(page) == wrong > 0
    page.select_option("#wrong", index=0)
    page.select_option("#right", index=0)
    choose(page, undecided="fine-tuning-1")
    assert count(page) == sum(row["rule"] == "undecided" for row in logs["fine-tuning-1"]) == 1
    page.click("text=Clear")
    expect(page.locator("#count")).to_have_text("60 questions")
    choose(page, rule="boxed")
    assert count(page) == 1
    choose(page, rule="last-number", where="fine-tuning-1")
    assert count(page) == sum(row["rule"] == "last-number" for row in logs["fine-tuning-1"])
    choose(page, reader="lm-eval-strict", rule="any rule", undecided="teacher-kd-1")
    assert count(page) == 60


def test_search_reads_questions_and_responses(opened: Callable[..., Any], report_file: Path) -> None:
    page = opened().go(report_file)
    page.fill("#text", word(17).upper())
    assert count(page) == 1
    page.press("#text", "Enter")
    assert shown(page) == "Question 18"
    assert page.locator("mark.hit").first.inner_text() == word(17)
    page.fill("#text", "how many are 5 ")
    assert count(page) == 1
    page.fill("#text", "nowhere at all")
    assert count(page) == 0


def test_links_and_the_back_button(opened: Callable[..., Any], report_file: Path) -> None:
    page = opened().go(report_file, "#q=12")
    assert shown(page) == "Question 12"
    expect(page.locator(".row[aria-selected=true] .number")).to_have_text("12")
    page.locator(".row", has_text="How many are 14 and").click()
    assert shown(page) == "Question 15"
    assert page.url.endswith("#q=15")
    page.go_back()
    expect(page.locator("#detail h3")).to_have_text("Question 12")
    page.go_forward()
    expect(page.locator("#detail h3")).to_have_text("Question 15")
    page = opened().go(report_file, "#q=999")
    expect(page.locator("#status")).to_contain_text("no question 999")


def test_keys(opened: Callable[..., Any], report_file: Path) -> None:
    page = opened().go(report_file)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    assert shown(page) == "Question 2"
    page.keyboard.press("ArrowDown")
    assert shown(page) == "Question 3"
    assert page.url.endswith("#q=3")
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_contain_text("Choose a question")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert shown(page) == "Question 2"
    page.keyboard.press("/")
    page.keyboard.type(word(30))
    assert count(page) == 1
    page.keyboard.press("Escape")
    page.keyboard.press("j")  # the only one that is left, and not the letter
    assert shown(page) == "Question 31"
    assert page.input_value("#text") == word(30)


def test_the_answer_is_marked_where_it_stands(opened: Callable[..., Any], report_file: Path) -> None:
    page = opened().go(report_file, "#q=2")
    marks = page.locator(".response mark.answer")
    expect(marks).to_have_count(7)
    assert set(marks.all_inner_texts()) == {"3"}  # behind characters that take two UTF-16 units
    for place, card in enumerate(page.locator(".card").all()):
        expect(card).to_contain_text("Took 3 by first-line")
        assert card.locator(".response").text_content() == response(place, 1)
    page.goto(report_file.as_uri() + "#q=3")
    expect(page.locator(".badge").first).to_have_text("? undecided")
    expect(page.locator("mark.answer")).to_have_count(0)


def test_hostile_responses_are_text(opened: Callable[..., Any], report_file: Path) -> None:
    found = opened()
    page = found.go(report_file, "#q=1")
    shown_as = page.locator(".card .response").first
    expect(shown_as).to_contain_text("</script><script>window.attacked = 1</script><img src=x onerror=")
    expect(shown_as).to_contain_text("{{packed}}")
    assert page.locator(".response > :not(mark)").count() == 0
    expect(page.locator(".asked")).to_contain_text("<i>2</i>")
    page.fill("#text", "<img src=x")
    assert count(page) == 1
    assert page.evaluate("window.attacked") is None
    assert found.problems == []


def test_the_policy_refuses_other_scripts_and_every_request(opened: Callable[..., Any], report_file: Path) -> None:
    page = opened().go(report_file)
    refused = page.evaluate(
        """async () => {
            const refused = new Set();
            addEventListener("securitypolicyviolation", (event) => refused.add(event.effectiveDirective));
            const add = (tag, name, value) => {
                const element = document.createElement(tag);
                element.setAttribute(name, value);
                document.body.append(element);
                return element;
            };
            add("img", "src", "x.png");
            add("script", "src", "x.js");
            add("link", "rel", "stylesheet").href = "x.css";
            add("iframe", "src", "x.html");
            add("div", "onclick", "window.attacked = 1").click();
            add("p", "style", "color: red");
            await fetch("x.txt").catch(() => {});
            await new Promise((resolve) => setTimeout(resolve, 200));
            return [...refused].sort();
        }"""
    )
    assert refused == [
        "connect-src",
        "frame-src",
        "img-src",
        "script-src-attr",
        "script-src-elem",
        "style-src-attr",
        "style-src-elem",
    ]
    assert page.evaluate("window.attacked") is None


def test_no_request_leaves_the_page(opened: Callable[..., Any], report_file: Path) -> None:
    found = opened()
    page = found.go(report_file)
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.fill("#text", "row-")
    assert set(found.requests) <= {"about:blank", report_file.as_uri()}
    assert found.problems == []


@pytest.mark.parametrize("fragment", ["", "#q=2"])
def test_a_phone_shows_list_or_question_and_nothing_overflows(
    opened: Callable[..., Any], report_file: Path, fragment: str
) -> None:
    page = opened(viewport=PHONE, has_touch=True).go(report_file, fragment)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    if fragment:
        page.get_by_text("← All questions").click()
    expect(page.locator("#list")).to_be_visible()
    page.locator(".row").nth(3).click()
    expect(page.locator("#list")).to_be_hidden()
    assert shown(page) == "Question 4"
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.go_back()
    expect(page.locator("#list")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("fragment", ["", "#q=2"])
def test_axe_finds_nothing_serious(
    opened: Callable[..., Any], report_file: Path, scheme: str, width: int, fragment: str
) -> None:
    # The policy would refuse axe itself.
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True).go(
        report_file, fragment
    )
    assert grave_violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_audits_page(
    opened: Callable[..., Any], audit_file: Path, scheme: str
) -> None:
    page = opened(color_scheme=scheme, bypass_csp=True).go(audit_file, "#q=6")
    assert grave_violations(page) == []


def test_the_audits_page_is_small_and_quick(
    opened: Callable[..., Any], audit_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = audit_file.stat().st_size
    found = opened()
    page = found.go(audit_file)
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    ready = page.evaluate("performance.now()")
    assert count(page) == 1319
    times = page.evaluate(
        """() => {
            const steps = [["wrong", "2"], ["right", "5"], ["rule", "2"], ["text", "step 3"], ["text", "e"],
                           ["text", "no such phrase"], ["text", ""], ["reader", "3"], ["rule", ""], ["wrong", ""]];
            const times = {};
            for (let round = 0; round < 5; round++) for (const [id, value] of steps) {
                const field = document.getElementById(id);
                field.value = value;
                const start = performance.now();
                field.dispatchEvent(new Event("input", {bubbles: true}));
                document.getElementById("list").getBoundingClientRect();  // layout included
                (times[`${id} ${value}`] ??= []).push(performance.now() - start);
            }
            return Object.fromEntries(Object.entries(times).map(([k, v]) => [k, v.sort((a, b) => a - b)[2]]));
        }"""
    )
    drawn = page.locator(".row").count()
    page.evaluate("document.getElementById('list').scrollTop = 40000")
    expect(page.locator(".row .number").first).not_to_have_text("1")
    with capsys.disabled():
        print(
            f"\naudit page: {size / 1e6:.2f} MB, first paint {paint:.0f} ms, responses there at {ready:.0f} ms, "
            f"slowest filter {max(times.values()):.0f} ms (medians of five: "
            + ", ".join(f"{step} {time:.0f}" for step, time in times.items())
            + f"), {drawn} rows drawn"
        )
    assert size <= 8_000_000
    assert paint < 2000
    assert max(times.values()) < 100
    assert drawn < 60
    assert found.problems == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_crates_preview_shows_table_and_chart_by_itself(
    opened: Callable[..., Any], width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["publish", "crate", "kd-mini.zip"]) == 0
    with ZipFile("kd-mini.zip") as archive:
        archive.extractall("unpacked")
    found = opened(java_script_enabled=False, viewport={"width": width, "height": 900})
    page = found.page
    page.goto((tmp_path / "unpacked" / PREVIEW).as_uri())
    expect(page.locator("#results tbody tr")).to_have_count(4)
    chart = page.locator("#chart-accuracy img")
    expect(chart).to_be_visible()
    assert chart.evaluate("image => image.naturalWidth") > 300
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in found.requests if not url.startswith("data:")] == [page.url]
    assert found.problems == []
    page.get_by_role("link", name="artifacts/mini/report/index.html").click()
    expect(page.locator("#chart-loss svg")).to_be_visible()
