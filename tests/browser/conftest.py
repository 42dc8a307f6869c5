"""Chromium, and the pages it opens: a small report with hostile responses, and the audit of the published logs."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from ruamel.yaml import YAML
from written import response

from kd.assess.score import log_text
from kd.cli import main
from kd.dataset import Example

REPOSITORY = Path(__file__).parents[2]
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
ROWS = 60


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
    examples = [
        Example(f"test-{i}", f"How many are {i} and <i>2</i>?", f"They are {i + 2}.\n#### {i + 2}", "")
        for i in range(ROWS)
    ]
    (folder / "artifacts/mini/logs").mkdir(parents=True)
    for place, (name, settings) in enumerate(params["experiments"].items()):
        prompts = [example.question + settings.get("suffix", "") for example in examples]
        answers = [
            SimpleNamespace(text=f" {response(place, i)}", tokens=9, reached_limit=i % 2 == 0) for i in range(ROWS)
        ]
        text = log_text(examples, prompts, cast(Any, answers))
        (folder / f"artifacts/mini/logs/{name}.csv").write_text(text, encoding="utf-8", newline="")
    adapter = folder / "artifacts/mini/adapters/teacher-kd/loss/plots/metrics"
    adapter.mkdir(parents=True)
    (adapter / "loss.tsv").write_text("step\tloss\n" + "".join(f"{i}\t{9 - i / 100}\n" for i in range(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        YAML().dump(params, Path("params.yaml"))
        assert main(["report"]) == 0
    return folder / "artifacts/mini/report/index.html"


@pytest.fixture(scope="session")
def logs(report_file: Path) -> dict[str, list[dict[str, str]]]:
    """The logs behind it."""
    found = {}
    for name in YAML(typ="safe").load(report_file.parents[3] / "params.yaml")["experiments"]:
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
