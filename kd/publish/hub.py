"""`kd publish hub`: a profile's adapters and results for the Hub.

Results, logs and the report's page go to a dataset repository, REPOSITORY, each adapter to a model repository of its
own, REPOSITORY-<run>: from the top of a repository peft's `AutoPeftModelForCausalLM.from_pretrained(name)` loads an
adapter and its base model; a folder of one, its `subfolder`, it would look for in the base model as well. And the Hub
shows one table of results a repository.

What goes is named one by one: an adapter's two files, the report's files by kind, the logs of the profile's runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import requests
from huggingface_hub import CommitOperationAdd, HfApi, configure_http_backend, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from requests.adapters import HTTPAdapter

from kd.config import BundledModel, Config, FolderModel, HubModel
from kd.errors import UserError, WorkFailedError
from kd.io.download import TIMEOUT_S, reason
from kd.io.files import sha256
from kd.io.progress import catch_up, progress, show_state
from kd.io.text import printable, read_text
from kd.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kd.models.load import model_name
from kd.models.settings import read_object
from kd.publish.agreement import RESULTS, publishable_results, refuse_published
from kd.publish.card import SMOLLM2, Edition, dataset_card, model_card, notice
from kd.publish.contents import CARD, report_files
from kd.scoring.log import log_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling
    from tqdm import tqdm

Content = bytes | Path
NOTICE = "NOTICE"
MARKS = {"dataset": f"report/{RESULTS}", "model": ADAPTER_CONFIG}  # what a repository of ours has, once it has anything
MADE_BY_HUB = {".gitattributes"}
OWN_WORDS = 300  # characters of what the Hub says
AGAIN = "what was sent is kept, run the same command again"


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub as it should be: its files by their path there; `tag` names this state of it."""

    name: str
    kind: Literal["dataset", "model"]
    files: Mapping[str, Content]
    tag: str = ""

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def plan(config: Config, params: Path, repository: str, base: str | None = None) -> list[Repository]:
    """What would go to which repository, the dataset first. Nothing is asked of a network.

    `config` is what `params` hold, and `base` what the Hub calls a student that comes from a folder. UserError for a
    name that cannot be, for results that do not belong together, and for what may not be passed on.
    """
    results, _ = publishable_results(config, params)
    edition = Edition(config, results, repository, _base(config, base))
    _check_names(edition)
    found = _dataset(edition)
    return [found, *(_model(edition, run, found.tag) for run in config.adapters)]


def rows(repositories: list[Repository]) -> list[tuple[str, ...]]:
    """Every file with its size and the repository it goes to, below a header."""
    return [
        ("kind", "repository", "bytes", "file"),
        *(
            (one.kind, one.name, f"{_size(content):,}", path)
            for one in repositories
            for path, content in one.files.items()
        ),
    ]


def upload(repositories: list[Repository]) -> list[tuple[str, ...]]:
    """Send to the Hub what it has not; returns what became of each repository, below a header.

    A repository that is not there is made. One commit fills it, so it is never half there. Large files that came before
    a connection broke stay at the Hub, which does not take them again. Nothing at the Hub is deleted.
    """
    api = _library(_token())
    with _explained(constants.ENDPOINT):
        api.whoami()
    there = {one.name: _there(api, one) for one in repositories}  # all names, before the first byte
    total = sum(_size(content) for one in repositories for content in one.files.values())
    done: list[tuple[str, ...]] = [("kind", "repository", "sent", "there already", "address")]
    with progress((), "upload", "B", total, scale=True) as bar:
        for one in repositories:
            show_state(bar, one.name)
            sent = _send(api, one, there[one.name], bar)
            done.append((one.kind, one.name, str(sent), str(len(one.files) - sent), one.address))
    return done


def _base(config: Config, named: str | None) -> str:
    """What the Hub calls the student."""
    match config.student.model:
        case FolderModel() as model:
            if named is None:
                raise UserError(
                    f"student.model: the folder {model.path} is on this machine alone; name the Hub's model that it is "
                    "with --base-model OWNER/NAME"
                )
            _check_name(named, "--base-model")
            return named
        case HubModel() as model:
            known = model.name
        case BundledModel():
            known = SMOLLM2
    if named not in (None, known):
        raise UserError(f"--base-model: the adapters were trained on {known}, not on {named}; leave the option out")
    return known


def _check_names(edition: Edition) -> None:
    """Refuse names that the Hub, or a model's licence, does not take."""
    for name in (edition.repository, *map(edition.repository_of, edition.config.adapters)):
        _check_name(name, "REPOSITORY")
    owner, _, name = edition.repository.partition("/")
    if edition.llamas and not name.startswith("Llama"):
        raise UserError(
            f"{edition.repository}: by its licence a model made with Llama has a name that begins with Llama; choose "
            f"{owner}/Llama-{name}"
        )


def _check_name(name: str, what: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        allowed = "letters, digits, and single `-`, `_` and `.` between them, at most 96 characters"
        raise UserError(f"{what}: {name} is no name of the Hub; expected OWNER/NAME of {allowed}") from None
    if "/" not in name:
        raise UserError(f"{what}: {name} says no owner; expected OWNER/NAME, such as your-name/{name}")


def _dataset(edition: Edition) -> Repository:
    """The dataset repository: card, report and logs."""
    config = edition.config
    paths = [*(log_file(config, run) for run in config.experiments), *report_files(config)]
    for path in paths:
        refuse_published(path, sha256(path))
    files: dict[str, Content] = {CARD: dataset_card(edition).encode()}
    files |= {path.relative_to(config.artifacts).as_posix(): path for path in paths}
    files |= _notice(edition)
    return Repository(edition.repository, "dataset", files, _tag(files))


def _model(edition: Edition, run: str, revision: str) -> Repository:
    """The model repository of a run's adapter."""
    folder, again = edition.config.artifacts / "adapters" / run, f"run `kd train {run}` again"
    files: dict[str, Content] = {
        CARD: model_card(edition, run, read_text(folder / CARD, again), revision).encode(),
        ADAPTER_CONFIG: _settings(edition, folder / ADAPTER_CONFIG, again),
        ADAPTER_WEIGHTS: folder / ADAPTER_WEIGHTS,
    }
    return Repository(edition.repository_of(run), "model", files | _notice(edition))


def _settings(edition: Edition, path: Path, again: str) -> Content:
    """An adapter's settings, in which the base model has the name that others find it by."""
    if model_name(edition.config.student.model) == edition.base:
        return path
    settings = read_object(path, again) | {"base_model_name_or_path": edition.base}
    return json.dumps(settings, indent=2, sort_keys=True).encode()


def _notice(edition: Edition) -> dict[str, Content]:
    text = notice(edition)
    return {NOTICE: text.encode()} if text else {}


def _tag(files: Mapping[str, Content]) -> str:
    """A name for these files and no others. It begins with letters, since digits with an `e` are a number in YAML."""
    lines = (f"{path}\0{_digest(content, hashlib.sha256())}\n" for path, content in sorted(files.items()))
    return "kd-" + hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _token() -> str:
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE: is set, so nothing can be sent; unset it")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise UserError("HF_TOKEN: not set; set it to a token of yours that may write to the Hub")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("HF_TOKEN: holds characters that no token has; copy the token anew")
    return token


class _Timely(HTTPAdapter):
    """Gives up on a host that says nothing, for which the library would wait for ever."""

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        return super().send(request, *arguments, **options | {"timeout": options.get("timeout") or TIMEOUT_S})


def _session() -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Timely())
    return session


def _library(token: str) -> HfApi:
    """The library, made to say nothing: addresses in its warnings are signed, and its bars are one a file. The storage
    that it prefers (Xet) has errors of its own kind, with such addresses; plain LFS takes the same files."""
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_ENABLE_HF_TRANSFER = True, False
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    configure_http_backend(_session)
    return HfApi(endpoint=constants.ENDPOINT, token=token, library_name="kd")


def _there(api: HfApi, repository: Repository) -> dict[str, RepoSibling]:
    """The files that a repository has at the Hub, by path; it is made if need be, and refused where it is not ours."""
    with _explained(repository.name):
        api.create_repo(repository.name, repo_type=repository.kind, exist_ok=True)
        found = api.repo_info(repository.name, repo_type=repository.kind, files_metadata=True)
    files = {one.rfilename: one for one in found.siblings or ()}
    others = sorted(files.keys() - MADE_BY_HUB)
    if others and MARKS[repository.kind] not in files:
        raise UserError(
            f"{repository.name}: is there and holds something else ({others[0]}), over which nothing is written; "
            "choose another REPOSITORY"
        )
    return files


def _send(api: HfApi, repository: Repository, there: Mapping[str, RepoSibling], bar: tqdm[Any]) -> int:
    """Bring a repository to what it should be; returns how many files it had not."""
    wanted = {path: content for path, content in repository.files.items() if not _is(content, there.get(path))}
    catch_up(bar, sum(_size(content) for path, content in repository.files.items() if path not in wanted))
    with _explained(repository.name):
        if wanted:
            api.create_commit(
                repository.name,
                [CommitOperationAdd(path, content) for path, content in wanted.items()],
                commit_message="kd publish hub",
                repo_type=repository.kind,
            )
        if repository.tag:
            api.create_tag(repository.name, tag=repository.tag, repo_type=repository.kind, exist_ok=True)
    bar.update(sum(map(_size, wanted.values())))
    return len(wanted)


def _is(content: Content, there: RepoSibling | None) -> bool:
    """Whether the Hub has these bytes: by the SHA-256 of a large file, by Git's object id of any other."""
    if there is None:
        return False
    if there.lfs:
        return _digest(content, hashlib.sha256()) == there.lfs.sha256
    return _digest(content, hashlib.sha1(f"blob {_size(content)}\0".encode(), usedforsecurity=False)) == there.blob_id


def _digest(content: Content, digest: Any) -> str:
    """The digest of what it has taken already and of the content, in hexadecimal."""
    with _opened(content) as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def _opened(content: Content) -> io.BufferedIOBase:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an error of the network into a sentence; its own text may hold signed addresses."""
    try:
        yield
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
        raise UserError("HF_ENDPOINT: not the address of a server; mend or unset it") from None
    except requests.RequestException as error:
        raise _in_words(what, error) from None
    except ValueError as error:  # the library's, of what the Hub says of a large file
        if "LFS batch API" not in str(error):
            raise
        raise WorkFailedError(f"{what}: {' '.join(str(error).split())}; {AGAIN}") from None
    except RuntimeError as error:  # the library's, around what broke a large file
        if not isinstance(error.__cause__, requests.RequestException):
            raise
        raise _in_words(what, error.__cause__) from None


def _in_words(what: str, error: requests.RequestException) -> UserError | WorkFailedError:
    answer, host = error.response, urlsplit(constants.ENDPOINT).netloc
    # The storage, another host, answers 403 for an address that has run out of time.
    status = answer.status_code if answer is not None and urlsplit(answer.url).netloc == host else None
    match status:
        case 401:
            return UserError(f"HF_TOKEN: {host} does not accept the token (401); set it to a valid one that may write")
        case 403:
            return UserError(
                f"{what}: {host} does not let you write there (403), the name is somebody else's or the token may only "
                "read; choose a REPOSITORY under your own name, or set HF_TOKEN to one that may write"
            )
        case 404:
            return UserError(f"{what}: {host} knows no such owner, or hides it from you (404); look at REPOSITORY")
    own = printable(" ".join((getattr(error, "server_message", None) or "").split()))[:OWN_WORDS]  # the Hub's
    return WorkFailedError(f"{what}: {reason(error)}{f' ({own})' if own else ''}; {AGAIN}")
