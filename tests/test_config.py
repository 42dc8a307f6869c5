"""Params: what loads, and what is refused with the key named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kd.cli import main
from kd.config import Needs, load_config
from kd.paper import PROMPTS, RESULTS

PROFILES = Path(__file__).parent.parent / "profiles"
MINI = (PROFILES / "mini.yaml").read_text()


@pytest.mark.parametrize("profile", ["mini", "mini-published", "paper", "single-gpu"])
def test_profiles_load_and_hold_the_six_published_experiments_and_the_fair_control(profile: str) -> None:
    config = load_config(PROFILES / f"{profile}.yaml")
    assert config.profile == profile
    assert set(config.runs) == {*RESULTS, "no-distillation-matched"}
    assert config.prompts == PROMPTS
    assert [name for name in config.runs if name in RESULTS] == list(RESULTS)
    assert [adapter.prompt for adapter in config.adapters.values()] == [None, *PROMPTS]
    assert list(config.adapters)[:2] == ["fine-tuning-1", "base-kd-1"]


def test_the_miniatures_differ_in_the_protocol_alone() -> None:
    ours, papers = (load_config(PROFILES / f"{name}.yaml").model_dump() for name in ("mini", "mini-published"))
    assert (ours["distill"].pop("protocol"), papers["distill"].pop("protocol")) == ("aligned", "published")
    assert (ours.pop("profile"), papers.pop("profile")) == ("mini", "mini-published")
    assert ours == papers


def test_a_profile_need_not_say_what_it_needs(tmp_path: Path) -> None:
    text = (PROFILES / "mini.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"^needs:.*?\n\n", "", text, flags=re.DOTALL | re.MULTILINE))
    assert load_config(path).needs == Needs()
    assert load_config(PROFILES / "mini.yaml").needs != Needs()


def test_paper_profile_states_the_published_protocol() -> None:
    config = load_config(PROFILES / "paper.yaml")
    distill = config.distill
    assert (config.teacher.cache, config.teacher.batch_rows) == ("q6", 1)
    assert (distill.temperature, distill.alpha) == (5.942267335064758, 0.6093348343631224)
    assert (distill.learning_rate, distill.momentum, distill.weight_decay) == (5e-6, 0.9, 1e-2)
    assert (distill.epochs, distill.cosine_steps, distill.max_tokens) == (2, 2638, 256)
    assert (distill.lora.rank, distill.lora.alpha) == (4, 8)
    assert {one.student: one.dropout for one in config.adapters.values() if one.dropout != 0.1} == {"base-kd": 0.2}
    assert {name: e.max_new_tokens for name, e in config.experiments.items() if e.max_new_tokens != 350} == {
        "no-distillation": 50
    }
    assert config.experiments["no-distillation"].suffix.startswith("\n Please respond with just the answer.")


@pytest.mark.parametrize(
    ("find", "replace", "message"),
    [
        ("rank: 4", "rnak: 4", "distill.lora.rnak: unknown key, expected one of rank, alpha, target_modules"),
        ("memory_gib: 4", "memory: 4", "needs.memory: unknown key, expected one of gpus, gpu_memory_gib, memory_gib"),
        ("memory_gib: 4", "gpus: -1", "needs.gpus: expected greater than or equal to 0, found -1"),
        ("rank: 4", "rank: four", "distill.lora.rank: expected a valid integer, found 'four'"),
        ("seeds: [1]", "sedes: [1]", "did you mean 'seeds'?"),
        ("base-kd: 0.2", "base-kd: 1.2", "distill.dropouts.base-kd: expected less than 1, found 1.2"),
        (
            "temperature: [1.0, 10.0]",
            "temperature: [1.0, .inf]",
            "search.temperature.1: expected a finite number, found inf",
        ),
        ("dropout: 0.1", "dropout: .nan", "distill.dropout: expected a finite number, found nan"),
        (
            "seeds: [1]",
            "seeds: [1, 18446744073709551616]",
            "seeds.1: expected less than 18446744073709551616, found 18446744073709",
        ),
        ("seeds: [1]", "seeds: []", "seeds: List should have at least 1 item"),
        ("seeds: [1]", "seeds: [3, 1, 3]", "seeds: a seed stands twice; name each once"),
        ("seeds: [1]", "seeds: 1", "seeds: expected a valid list, found 1"),
        ("  seed: 1 ", "  #", "dataset.seed: missing; profiles/mini.yaml shows what belongs there"),
        ("[1, 2, 3]", "[2, 2]", "search.seeds: a seed stands twice; name each once"),
        ("epochs: 1", "epochs: true", "distill.epochs: expected a valid integer, found True"),
        ('base: ""', "base:", "prompts.base: expected a valid string, found None"),
        ('base: ""', "base: []", "prompts.base: expected a valid string, found []"),
        ('  base: ""', '  a b: ""', "prompts.a b: String should match"),
        (
            '  base: ""',
            '  head: ""',
            "prompts.head: beside the prompts' stores lies a folder of that name",
        ),
        (
            "base-kd: 0.2",
            "bsae-kd: 0.2",
            "distill.dropouts.bsae-kd: unknown student 'bsae-kd', expected one of fine-tuning, base-kd",
        ),
        ("[fine-tuning]", "[base-kd]", "controls: the name 'base-kd' is that of a student by `prompts.base`; choose"),
        ("[fine-tuning]", "[a, a]", "controls: the name 'a' is that of a student by `controls`; choose another"),
        (
            "[fine-tuning]",
            "[base-kd-1]",
            "controls: the name 'base-kd-1' is that of base-kd with seed 1; choose another",
        ),
        (
            "  no-distillation:",
            "  base-kd:",
            "untrained.base-kd: the name 'base-kd' is that of a student by `prompts.base`",
        ),
        (
            "  no-distillation:",
            "  fine-tuning-1:",
            "'fine-tuning-1' is that of fine-tuning with seed 1; choose another",
        ),
        ("  max_new_tokens: 32", "  max_new_tokens: 0", "assess.max_new_tokens: expected greater than 0, found 0"),
        ("source: miniature", "source: minature", "dataset.source: expected one of 'miniature', 'folder', 'hub'"),
        ("{source: bundled}", "{source: folder}", "teacher.model.path: missing"),
        (
            "{source: bundled}",
            "{source: hub, name: a/b, revision: main}",
            "teacher.model.revision: String should match",
        ),
        ("dtype: float32", "dtype: float64", "teacher.dtype: expected 'float32', 'bfloat16' or 'float16'"),
        ("dtype: float32", "dtype: float32\n  cache: q6", "teacher: cache: belongs to `backend: exllamav2`"),
        ("protocol: aligned", "protocol: shifted", "distill.protocol: expected 'published' or 'aligned'"),
        ("quirks: []", "quirks: [boss]", "distill.quirks.0: expected 'no-end', 'teacher-order', 'label-shift'"),
        (
            "protocol: aligned\n  quirks: []",
            "protocol: published\n  quirks: [bos]",
            "distill: quirks: `protocol: published` has all of them; empty the list, or",
        ),
        ("quirks: []", "quirks: [bos, label-shift, bos]", "distill: quirks: a quirk stands twice; name each once"),
        ("reverse-kl", "reversed-kl", "distill.divergence: expected 'reverse-kl', 'forward-kl' or 'jsd'"),
        ("[1.0, 10.0]", "[10.0, 1.0]", "search: temperature: expected [low, high], found [10.0, 1.0]"),
        ("questions: 10", "questions: 0", "attention.questions: expected greater than 0, found 0"),
        ("profile: mini", "profile: ../mini", "profile: String should match"),
        ("seeds: [1]", "seeds: [1", "not readable as YAML"),
        ("epochs: 1", "epochs: 1\n  epochs: 3", "duplicate key"),
    ],
)
def test_unusable_params_exit_2_and_name_the_key(
    find: str, replace: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (PROFILES / "mini.yaml").read_text()
    assert find in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(find, replace, 1))
    assert main(["prepare", "--params", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


def test_prompts_without_their_texts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"^prompts:.*?\n\n", "prompts: [base, teacher]\n\n", MINI, flags=re.DOTALL | re.MULTILINE))
    assert main(["prepare", "--params", str(path)]) == 2
    error = capsys.readouterr().err
    assert "prompts: expected a mapping, found ['base', 'teacher']; profiles/mini.yaml shows what" in error


def test_a_prompt_is_a_student_and_a_row_that_is_asked_as_all_are(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(MINI.replace('  base: ""\n', '  base: ""\n  socratic: "Ask back. "\n', 1))
    config = load_config(path)
    assert config.prompts["socratic"] == "Ask back. "
    assert config.adapters["socratic-kd-1"].prompt == "socratic"
    row = config.experiments["socratic-kd-1"]
    assert row == replace(config.experiments["base-kd-1"], student="socratic-kd")
    assert row.asked == config.experiments["no-distillation-matched"].asked == ("", config.assess.max_new_tokens, ())


def test_every_student_has_a_run_for_each_seed_and_an_untrained_row_has_none(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(MINI.replace("seeds: [1]", "seeds: [7, 0]", 1))
    config = load_config(path)
    assert config.runs["no-distillation"] == {None: "no-distillation"}
    assert config.runs["teacher-kd"] == {7: "teacher-kd-7", 0: "teacher-kd-0"}
    assert {run: one.seed for run, one in config.adapters.items() if one.student == "base-kd"} == {
        "base-kd-7": 7,
        "base-kd-0": 0,
    }
    assert [one.adapter for one in config.experiments.values()][:4] == [None, None, "fine-tuning-7", "fine-tuning-0"]


OLD = """adapters:
  fine-tuning: {needs: data}
experiments:
  no-distillation-matched: {needs: data}
  fine-tuning: {needs: adapters/fine-tuning}
"""


def test_a_params_file_of_before_is_told_what_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    text = MINI.replace("seeds: [1]", "seed: 5", 1).replace("controls: [fine-tuning]", OLD, 1)
    path.write_text(re.sub(r"^untrained:.*?\n\n", "", text, flags=re.DOTALL | re.MULTILINE))
    assert main(["prepare", "--params", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"kd: {path}: seed: a list now, `seeds: [5]`, and that of the problems is `dataset.seed: 5`; adapters: "
        "`controls: [fine-tuning]` now, a list of those that learn from the labels alone; experiments: `untrained` "
        "now, with the rows of the bare student alone, without `needs`\n"
    )


def test_missing_params_file_says_how_to_make_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--params", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such file; `cp profiles/mini.yaml" in capsys.readouterr().err


def test_every_mistake_is_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    text = (PROFILES / "mini.yaml").read_text()
    path.write_text(text.replace("rank: 4", "rank: 0").replace("epochs: 1", "epochs: one"))
    assert main(["prepare", "--params", str(path)]) == 2
    error = capsys.readouterr().err
    assert "distill.lora.rank" in error
    assert "distill.epochs" in error
