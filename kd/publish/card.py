"""Cards of the Hub: a repository's README.md, with results in the metadata that the Hub shows as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData, RepoCard, constants

from kd.config import BundledModel, Config, Experiment, HubDataset, MiniatureDataset
from kd.models.load import model_name
from kd.report.finding import comparability, finding, listed
from kd.report.signs import in_words
from kd.report.tables import markdown, markdown_table, notes, result_rows
from kd.scoring.significance import wilson_interval

TAGS = ["response-priming", "knowledge-distillation"]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the Hub's original of the bundled model
MADE_BY = (
    "Made by kd, which reruns *Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting* "
    "([arXiv:2412.17846](https://arxiv.org/abs/2412.17846))."
)
_LLAMA = re.compile(r"llama-(3(?:\.\d)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Edition:
    """What is published together: a profile's results in the dataset repository `repository`, and each run's adapter in
    a model repository beside it.

    `base` is what the Hub calls the student, and `results` the document that `kd report` writes.
    """

    config: Config
    results: dict[str, Any]
    repository: str
    base: str

    def repository_of(self, run: str) -> str:
        """The model repository of a run's adapter."""
        return f"{self.repository}-{run}"

    @property
    def llamas(self) -> list[str]:
        """The versions of Llama 3 that made the adapters, the student's first; their licences ask for a name and a
        notice."""
        names = (self.base, model_name(self.config.teacher.model))
        return list(dict.fromkeys(match[1] for name in names if (match := _LLAMA.search(name))))


def model_card(edition: Edition, run: str, written: str, revision: str) -> str:
    """The card of a run's adapter: what training has `written` of it, how to load it, and its results.

    `revision` is that of the dataset repository's files.
    """
    student = edition.config.adapters[run].student
    of_student = edition.results["experiments"][student]
    of_run = next(one for one in of_student["runs"] if one["name"] == run)
    data, name = edition.config.dataset, edition.repository_of(run)
    metadata = ModelCardData(
        base_model=edition.base,
        datasets=[data.name] if isinstance(data, HubDataset) else None,
        language="en",
        library_name="peft",
        model_name=name.partition("/")[2],
        pipeline_tag="text-generation",
        tags=[*TAGS, "lora"],
        eval_results=_evaluations(edition, student, of_student, of_run, revision),
        **_licence(edition),
    )
    return _card(
        metadata,
        f"# {name.partition('/')[2]}",
        _collapse(of_run),
        _described(edition, run, written),
        _built_with(edition),
        f"""## Load

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```

{_asked(edition.config.experiments[run])}""",
        "## Results",
        f"{_right(of_run)} {_seeds(student, of_student, of_run)}",
        f"Beside the other students: {finding(edition.results)} {comparability(edition.results)}",
        markdown_table(result_rows(edition.results)).strip(),
        "\n".join(f"- {note}" for note in notes(edition.results)),
        f"Every response, charts and logs: [{edition.repository}]({_address(edition.repository, revision)}).",
    )


def dataset_card(edition: Edition) -> str:
    """The card of the dataset repository: the results, and what lies there."""
    runs = list(edition.config.experiments)
    metadata = DatasetCardData(
        language=["en"],
        license=_llama_licence(edition) or "mit",
        pretty_name=f"Response-priming distillation: {edition.results['profile']}",
        tags=TAGS,
        task_categories=["text-generation"],
        configs=[{"config_name": run, "data_files": [{"split": "test", "path": f"logs/{run}.csv"}]} for run in runs],
    )
    adapters = (edition.repository_of(run) for run in edition.config.adapters)
    return _card(
        metadata,
        markdown(edition.results).strip(),
        "![Accuracies](report/accuracy.png)",
        f"""## What lies here

`report/index.html` is the report's page, one file with every question and response: download and open it.
`report/results.json` has the numbers, `report/losses/` the training losses, `logs/` what each student answered:

```python
from datasets import load_dataset

log = load_dataset("{edition.repository}", "{runs[-1]}", split="test")
```""",
        "## Adapters\n\n" + "\n".join(f"- [{name}]({constants.HUGGINGFACE_CO_URL_HOME}{name})" for name in adapters),
        _built_with(edition),
    )


def notice(edition: Edition) -> str:
    """The notice that Llama's licences ask for; empty where no Llama made the adapters."""
    return "".join(
        f"Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.\n"
        for version in edition.llamas
    )


def _card(metadata: ModelCardData | DatasetCardData, *parts: str) -> str:
    return f"---\n{metadata.to_yaml()}\n---\n" + "\n\n".join(filter(None, (*parts, MADE_BY))) + "\n"


def _evaluations(
    edition: Edition, student: str, of_student: Mapping[str, Any], of_run: Mapping[str, Any], revision: str
) -> list[EvalResult]:
    """The run's accuracy, and where there are several seeds the student's, as shares.

    Rows that are no dataset of the Hub are named by the log in which they lie.
    """
    data, seeds = edition.config.dataset, of_student["runs"]
    where: dict[str, Any]
    if isinstance(data, HubDataset):
        where = {"name": "GSM8K", "type": data.name, "config": "main", "revision": data.revision}
    else:
        kind = "generated problems" if isinstance(data, MiniatureDataset) else "JSON lines of one's own"
        name = f"{edition.results['profile']}: {kind} in GSM8K's schema"
        where = {"name": name, "type": edition.repository, "config": of_run["name"], "revision": revision}
    found = {"Accuracy": (of_run["accuracy"], {"correct": of_run["correct"], "rows": of_run["rows"]})}
    if len(seeds) > 1:
        spread = {"seeds": [one["seed"] for one in seeds], "collapsed": of_student["collapsed"]}
        found[f"Accuracy of {student}, mean of {len(seeds)} seeds"] = (of_student["accuracy"], spread)
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Grade-school mathematics",
            dataset_split="test",
            dataset_args={"rows": data.test_rows},
            metric_type="accuracy",
            metric_name=metric,
            metric_value=round(value, 4),
            metric_args=behind,
            source_name="Report",
            source_url=_address(edition.repository, revision),
            **{f"dataset_{key}": of_data for key, of_data in where.items()},
        )
        for metric, (value, behind) in found.items()
    ]


def _licence(edition: Edition) -> dict[str, Any]:
    """An adapter's licence is its base model's."""
    if llama := _llama_licence(edition):
        return {"license": llama}
    if edition.base == SMOLLM2:
        return {"license": "apache-2.0"}
    page = f"{constants.HUGGINGFACE_CO_URL_HOME}{edition.base}"
    return {"license": "other", "license_name": "that-of-the-base-model", "license_link": page}


def _built_with(edition: Edition) -> str:
    return "Built with Llama." if edition.llamas else ""


def _llama_licence(edition: Edition) -> str:
    """The Hub's name of the first Llama's licence; empty where there is none."""
    return f"llama{edition.llamas[0]}" if edition.llamas else ""


def _described(edition: Edition, run: str, written: str) -> str:
    """What training has written of an adapter, without its heading and with the Hub's name of the student."""
    student = edition.config.student.model
    said = RepoCard(written, ignore_metadata_errors=True).text.strip().removeprefix(f"# {run}").strip()
    said = said.replace("\nBuilt with Llama.\n", "")  # which stands below
    if isinstance(student, BundledModel):
        said += (
            f"\n- weights: trained and assessed on those of {model_name(student)}, the original's at 4 bits (Q4_1) and "
            f"computed with as {edition.config.student.dtype}; on {edition.base} itself responses can differ"
        )
    return said.replace(f"LoRA adapter of {model_name(student)}", f"LoRA adapter of {edition.base}")


def _asked(one: Experiment) -> str:
    """What a student reads, and how it answers."""
    behind = f", behind it {one.suffix!r}" if one.suffix else ""
    return (
        f"It reads BOS and the bare question{behind}, without a chat template. Its results are those of greedy "
        f"decoding, at most {one.max_new_tokens} new tokens."
    )


def _collapse(run: Mapping[str, Any]) -> str:
    said = "; ".join(in_words(sign, run["rows"]) for sign in run["signs"])
    return f"**This run collapsed**: {said}." if said else ""


def _right(run: Mapping[str, Any]) -> str:
    low, high = wilson_interval(run["correct"], run["rows"])
    return (
        f"This run has {run['correct']} of {run['rows']} test questions right, {run['accuracy']:.2%} (95 % interval "
        f"over questions {low:.1%} to {high:.1%})."
    )


def _seeds(student: str, result: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """How many seeds a student was trained with, and what came of the others."""
    runs: Sequence[Mapping[str, Any]] = result["runs"]
    if len(runs) == 1:
        return f"{student} was trained with one seed, {run['seed']}: nothing here speaks of other seeds."
    fallen = [str(seed) for seed in result["collapsed"]]
    return (
        f"It has seed {run['seed']}, one of {len(runs)}: over all of them {student} has {result['accuracy']:.2%} on "
        f"average, {result['lowest']:.2%} to {result['highest']:.2%}, and "
        + (f"{len(fallen)} collapsed (seed {listed(fallen)})." if fallen else "none collapsed.")
    )


def _address(repository: str, revision: str) -> str:
    return f"{constants.HUGGINGFACE_CO_URL_HOME}datasets/{repository}/tree/{revision}"
