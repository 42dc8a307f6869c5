"""Logs as lm-evaluation-harness's own files: its schema, and where it is installed, its own writer and readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from commands import contents
from params import experiments, keep, run_of
from rows import prepare_tests

from kd.cli import main
from kd.machine.record import made_here
from kd.scoring.log import Response, log_text
from kd.scoring.review import response_sha256

NAMES = ["no-distillation", "base-kd"]  # the first with a suffix
TRUTHS = [18, 70000, 3, 4]
RESPONSES = {
    "no-distillation": [" 18", " 7", " no\u2028idea", " many, or 2,000 of 3 or 4"],
    "base-kd": [" \\boxed{18}", " \\boxed{70,000}", " I cannot say \N{SNOWMAN}", " none\n"],
}
SAMPLES, RESULTS = Path("out/base-kd-1/samples_mini_{}.jsonl"), Path("out/base-kd-1/results_{}.json")
UNKNOWN, KNOWN = "1970-01-01T00-00-00", "2026-11-27T13-14-15"
# lm_eval/result_schema.py, SampleResult: what every line has, beside its metrics.
SCHEMA = {
    "doc_id": int,
    "doc": dict,
    "target": str,
    "arguments": dict,
    "resps": list,
    "filtered_resps": list,
    "filter": str,
    "metrics": list,
    "doc_hash": str,
    "prompt_hash": str,
    "target_hash": str,
}


@pytest.fixture
def published(tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A working folder with two students' logs, and `out`, made of them."""
    keep(tiny_params, *NAMES)
    write_params(tiny_params)
    tests = prepare_tests((f"How many are {truth}?", f"So:\n#### {truth}") for truth in TRUTHS)
    tiny_params["dataset"]["test_rows"] = len(tests)
    write_params(tiny_params)
    Path("artifacts/mini/logs").mkdir()
    for name, responses in RESPONSES.items():
        prompts = [test.question + experiments(tiny_params)[run_of(name)].suffix for test in tests]
        answers = [Response(text, 5, False) for text in responses]
        Path(f"artifacts/mini/logs/{run_of(name)}.csv").write_text(log_text(tests, prompts, answers), newline="")
    assert main(["publish", "samples", "out"]) == 0
    return tiny_params


def lines(at: str = UNKNOWN) -> list[dict[str, Any]]:
    # Not splitlines, which takes a line separator within a text for a line's end.
    return [json.loads(line) for line in Path(str(SAMPLES).format(at)).read_text().split("\n")[:-1]]


def results(at: str = UNKNOWN) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(str(RESULTS).format(at)).read_text())
    return found


@pytest.mark.usefixtures("published")
def test_every_question_is_a_line_of_the_harness_own_schema() -> None:
    assert len(lines()) == len(TRUTHS)
    for number, (sample, truth) in enumerate(zip(lines(), TRUTHS, strict=True)):
        assert {key: type(sample[key]) for key in SCHEMA} == SCHEMA
        assert (sample.keys() - SCHEMA.keys(), sample["metrics"]) == ({"exact_match"}, ["exact_match"])
        assert (sample["doc_id"], sample["doc"]["question"]) == (number, f"How many are {truth}?")
        assert sample["arguments"]["gen_args_0"]["arg_0"] == sample["doc"]["question"]
        assert sample["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 6
        assert sample["resps"] == [[RESPONSES["base-kd"][number]]]
    assert [sample["filtered_resps"] for sample in lines()] == [["18"], ["70000"], ["[invalid]"], ["[invalid]"]]
    assert [sample["exact_match"] for sample in lines()] == [1.0, 1.0, 0.0, 0.0]


def test_a_run_s_suffix_is_part_of_what_it_was_asked(published: dict[str, Any]) -> None:
    suffix = experiments(published)["no-distillation"].suffix
    assert suffix
    (file,) = Path("out/no-distillation").glob("samples_*")
    sample = json.loads(file.read_text().partition("\n")[0])
    assert sample["arguments"]["gen_args_0"]["arg_0"] == sample["doc"]["question"] + suffix


@pytest.mark.usefixtures("published")
def test_results_are_what_the_lines_come_to() -> None:
    found = results()
    scored = found["results"]["mini"]
    assert (scored["exact_match,documented"], scored["sample_len"]) == (0.5, 4)
    assert scored["exact_match_stderr,documented"] == pytest.approx(stdev([1, 1, 0, 0]) / 2)
    assert (found["model_name"], found["n-samples"]["mini"]["effective"]) == ("base-kd-1", 4)
    assert str(Path.cwd().parent) not in json.dumps(found)  # nothing of this machine


@pytest.mark.usefixtures("published")
def test_a_decision_by_hand_and_the_assessment_s_time_are_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    record = Path("artifacts/mini/runs/assess/base-kd-1.json")
    made = made_here(datetime.now().astimezone())
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(made | {"ended": "2026-11-27T14:14:15"}))
    assert main(["publish", "samples", "out"]) == 2
    assert f"{record}: ended: " in capsys.readouterr().err
    record.write_text(json.dumps(made | {"ended": "2026-11-27T14:14:15+01:00"}))
    open_row = response_sha256("How many are 3?", RESPONSES["base-kd"][2].strip())
    Path("reviews").mkdir()
    Path("reviews/base-kd-1.csv").write_text(f"row,question,sha256,answer\n3,How many are 3?,{open_row},3\n")
    assert main(["publish", "samples", "out"]) == 0
    assert (lines(KNOWN)[2]["filtered_resps"], lines(KNOWN)[2]["exact_match"]) == (["3"], 1.0)
    assert (results(KNOWN)["results"]["mini"]["exact_match,documented"], results(KNOWN)["date"]) == (0.75, 1795785255)
    assert lines()[2]["exact_match"] == 0  # what was there is left alone, and readers take the latest


@pytest.mark.usefixtures("published")
def test_the_same_logs_give_the_same_bytes_and_a_missing_one_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(Path("out"))
    assert main(["publish", "samples", "out"]) == 0
    assert contents(Path("out")) == before
    Path("artifacts/mini/logs/base-kd-1.csv").unlink()
    capsys.readouterr()
    assert main(["publish", "samples", "more"]) == 2
    assert "kd assess base-kd-1" in capsys.readouterr().err
    assert not Path("more").exists()
    Path("file").touch()
    assert main(["publish", "samples", "file"]) == 2
    assert "file: is a file; name a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("published")
def test_the_harness_own_code_writes_the_same_bytes_and_reads_them(tmp_path: Path) -> None:
    reason = "lm-evaluation-harness is not installed; `pip install lm-eval`, apart from the pins, tries it"
    utils = pytest.importorskip("lm_eval.utils", reason=reason)
    tracker = pytest.importorskip("lm_eval.loggers.evaluation_tracker", reason=reason)
    schema = pytest.importorskip("lm_eval.result_schema", reason=reason)
    assert set(schema.SampleResult.__annotations__) == set(SCHEMA)
    assert results().keys() <= set(schema.EvalResults.__annotations__)

    files = [path.as_posix() for path in sorted(Path("out/base-kd-1").iterdir())]
    (sample_file,), (result_file,) = utils.get_sample_results_filenames(files), utils.get_results_filenames(files)
    assert utils.get_latest_filename([sample_file]) == sample_file
    assert utils.get_file_task_name(Path(sample_file).name) == "mini"
    assert utils.get_file_datetime(Path(sample_file).name) == UNKNOWN

    samples = lines()
    for sample in samples:
        arguments = sample["arguments"]["gen_args_0"]
        assert sample["prompt_hash"] == utils.hash_string(arguments["arg_0"])
        assert sample["target_hash"] == utils.hash_string(sample["target"])
        shown = json.dumps(sample["doc"], indent=2, default=utils.handle_non_serializable, ensure_ascii=False)
        assert sample["doc_hash"] == utils.hash_string(shown)
        sample["arguments"] = [(arguments["arg_0"], arguments["arg_1"])]  # as it holds them in memory
    theirs = tracker.EvaluationTracker(output_path=str(tmp_path / "theirs"))
    theirs.general_config_tracker.model_name = theirs.general_config_tracker.model_name_sanitized = "base-kd-1"
    theirs.general_config_tracker.model_source = "kd"
    theirs.save_results_aggregated(results(), {"mini": samples})
    theirs.save_results_samples("mini", samples)
    (written,) = (tmp_path / "theirs/base-kd-1").glob("samples_mini_*.jsonl")
    assert written.read_bytes() == Path(sample_file).read_bytes()
    (document,) = (tmp_path / "theirs/base-kd-1").glob("results_*.json")
    assert json.loads(document.read_text())["task_hashes"] == json.loads(Path(result_file).read_text())["task_hashes"]

    pytest.importorskip("pytablewriter", reason=reason)
    assert "|documented|     0|exact_match|↑  |  0.5|±  |0.2887|" in utils.make_table(results())


@pytest.mark.usefixtures("published")
def test_datasets_reads_them_as_the_hub_does(tmp_path: Path) -> None:
    from datasets import Dataset

    read = Dataset.from_json(str(SAMPLES).format(UNKNOWN), cache_dir=str(tmp_path / "cache"))
    assert [row["filtered_resps"] for row in read] == [["18"], ["70000"], ["[invalid]"], ["[invalid]"]]
