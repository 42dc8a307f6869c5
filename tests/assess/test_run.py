"""`kd assess` as a stage: killed and gone on with, over several processes, unusable rows, --exact and --compare."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import answers, rows_of
from commands import unfinished
from forked import begin

from kd.assess.journal import Journal
from kd.assess.row import NAN_TOKEN, Row
from kd.cli import main
from kd.models.load import encode, load_model, load_tokenizer

LOG = Path("artifacts/mini/logs/no-distillation.csv")
TEST = Path("artifacts/mini/data/test.jsonl")


@pytest.fixture
def prepare(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """Prepare the miniature, with other settings of no-distillation where given."""

    def prepare(rows: int = 6, batch_tokens: int = 200, **settings: Any) -> None:
        tiny_params["dataset"]["test_rows"] = rows
        tiny_params["assess"]["batch_tokens"] = batch_tokens  # one slot or two
        tiny_params["untrained"]["no-distillation"] |= settings
        write_params(tiny_params)
        assert main(["prepare"]) == 0

    return prepare


def uninterrupted() -> bytes:
    assert main(["assess", "no-distillation"]) == 0
    log = LOG.read_bytes()
    LOG.unlink()
    return log


def edit_question(row: int, question: str) -> None:
    lines = TEST.read_text().splitlines()
    lines[row] = json.dumps(json.loads(lines[row]) | {"question": question})
    TEST.write_text("\n".join(lines) + "\n")


def asked(capsys: pytest.CaptureFixture[str]) -> int:
    """How many rows the last run set out to answer."""
    bar = capsys.readouterr().err.rpartition("| ")[2]
    return int(bar.partition("/")[2].partition(" ")[0]) if "question" in bar else 0


def journals() -> list[Path]:
    return sorted(Path("artifacts/mini/logs/.partial/no-distillation.csv").glob("*/*.jsonl"))


def test_killed_anywhere_the_next_run_does_what_is_missing(
    prepare: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(rows=24, max_new_tokens=40)
    expected = uninterrupted()
    process = begin("assess", "no-distillation")
    deadline = time.monotonic() + 60
    while not (journals() and journals()[0].stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not LOG.exists()
    [journal] = journals()
    kept = journal.read_bytes().count(b"\n")
    assert 0 < kept < 24
    with journal.open("ab") as file:
        file.write(b'{"row": 23, "text": "torn')
    capsys.readouterr()
    assert main(["assess", "no-distillation"]) == 0
    assert asked(capsys) == 24 - kept
    assert LOG.read_bytes() == expected
    assert not unfinished()


def test_every_prefix_of_the_work_leads_to_the_same_log(
    prepare: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(rows=7, batch_tokens=400)
    expected = uninterrupted()
    original = Journal.add
    for stop_at in range(1, 7):
        calls = iter(range(1, 100))

        def add(journal: Journal, responses: Any, calls: Any = calls, stop_at: int = stop_at) -> None:
            original(journal, responses)
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "add", add)
        main(["assess", "no-distillation"])
        monkeypatch.setattr(Journal, "add", original)
        assert main(["assess", "no-distillation"]) == 0
        assert LOG.read_bytes() == expected


def test_a_changed_setting_does_not_go_on_with_old_rows(
    prepare: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare()
    with monkeypatch.context() as patch:
        original = Journal.add
        patch.setattr(Journal, "add", lambda *given: (original(*given), (_ for _ in ()).throw(KeyboardInterrupt))[0])
        assert main(["assess", "no-distillation"]) == 130
    prepare(max_new_tokens=3)
    capsys.readouterr()
    assert main(["assess", "no-distillation"]) == 0
    assert asked(capsys) == 6
    assert not unfinished()


def test_several_processes_write_the_log_of_one(
    prepare: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(rows=7)
    expected = uninterrupted()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, rows in ((2, 3), (1, 2), (0, 2)):
        monkeypatch.setenv("RANK", str(rank))
        capsys.readouterr()
        assert not LOG.exists()
        assert main(["assess", "no-distillation"]) == 0
        assert asked(capsys) == rows
    assert LOG.read_bytes() == expected


def test_a_row_that_fails_is_named_kept_from_the_log_and_alone_tried_again(
    prepare: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare()
    expected = uninterrupted()
    add = Row.add
    with monkeypatch.context() as patch:
        patch.setattr(Row, "add", lambda row, token: add(row, NAN_TOKEN if row.index == 2 else token))
        assert main(["assess", "no-distillation"]) == 1
    assert "test-00003 failed (its logits are not numbers (NaN)); finished rows are kept" in (capsys.readouterr().err)
    assert not LOG.exists()
    assert main(["assess", "no-distillation"]) == 0
    assert asked(capsys) == 1
    assert LOG.read_bytes() == expected


def test_an_empty_question_and_a_special_tokens_name_are_text(prepare: Callable[..., None], tiny_llama: Path) -> None:
    prepare(suffix="")
    edit_question(0, "")
    edit_question(1, "Ada </s> walks <s> home.")
    assert main(["assess", "no-distillation"]) == 0
    model, tokenizer = load_model(tiny_llama, "float32", "cpu"), load_tokenizer(tiny_llama)
    assert tokenizer.pad_token is None
    [empty, named] = rows_of(tokenizer, ["", "Ada </s> walks <s> home."], 6)
    assert empty.prompt == [tokenizer.bos_token_id]
    assert named.prompt.count(tokenizer.eos_token_id) == 0
    assert named.prompt.count(tokenizer.bos_token_id) == 1
    first = answers(model, tokenizer, [""], 6)[0].text
    log = LOG.read_text()
    assert first.split("\n")[0] in log


def test_a_question_longer_than_the_context_is_named(
    prepare: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare()
    edit_question(3, "long " * 3000)
    assert main(["assess", "no-distillation"]) == 2
    error = capsys.readouterr().err
    assert "kd: test-00004: " in error
    assert "leave no room for an answer in the student's context of 2048; shorten the question" in error


def test_a_question_that_nearly_fills_the_context_gets_what_is_left(
    prepare: Callable[..., None], tiny_llama: Path
) -> None:
    prepare(rows=2, suffix="", batch_tokens=4096, max_new_tokens=20)
    tokenizer = load_tokenizer(tiny_llama)
    question = "?" * 2044
    assert len(encode(tokenizer, question, bos=True)) == 2045
    edit_question(0, question)
    assert main(["assess", "no-distillation"]) == 0
    batched = LOG.read_text()
    assert ",3,True," in batched.replace("\n", " ")
    assert main(["assess", "no-distillation", "--exact"]) == 0
    assert LOG.read_text() == batched


def test_stop_strings_end_a_response_before_them(tiny_llama: Path) -> None:
    model, tokenizer = load_model(tiny_llama, "float32", "cpu"), load_tokenizer(tiny_llama)
    prompts = ["Tom has 3 apples.", "Why?"]
    [free, other] = answers(model, tokenizer, prompts, 30)
    stop = free.text[8:11]
    assert stop not in other.text
    for slots in (8, None):
        [stopped, unstopped] = answers(model, tokenizer, prompts, 30, slots, (stop,))
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.tokens < free.tokens
        assert not stopped.reached_limit
        assert unstopped == other


def test_exact_writes_the_same_log_and_compare_says_so(
    prepare: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(batch_tokens=1000)
    expected = uninterrupted()
    assert main(["assess", "no-distillation", "--exact"]) == 0
    assert LOG.read_bytes() == expected
    LOG.unlink()
    capsys.readouterr()
    assert main(["assess", "no-distillation", "--compare", "4", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["rows"] == 4
    assert compared["identical_responses"] == compared["identical_answers"] == 1
    assert not LOG.exists()
    assert main(["assess", "no-distillation", "--compare", "2"]) == 0
    assert "identical responses: 100.0%\nidentical extracted answers: 100.0%\nbatched: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["assess", "no-distillation", "--compare", "0"])
    assert "expected a number from 1 up, found '0'" in capsys.readouterr().err


def test_a_damaged_journal_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kd.errors import UserError

    (tmp_path / "0.jsonl").write_text('{"row": 0, "text": "x", "tokens": 1, "reached_limit": false}\n[1]\n')
    with pytest.raises(UserError, match=r"0.jsonl line 2: not a finished row; remove the line and run again"):
        Journal(tmp_path, 0).read()
    assert capsys.readouterr().err == ""
