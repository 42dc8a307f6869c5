"""docs/share.md, followed: its own commands, against an S3 server on this machine and another's clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from commands import contents
from conftest import REPOSITORY, environment
from params import keep
from ruamel.yaml import YAML

from kd.config import load_config
from kd.machine.stages import stages_of

pytest.importorskip("dvc_s3", reason="needs the extra s3")
server = pytest.importorskip("moto.server", reason="needs moto's S3 server")

PAGE = (REPOSITORY / "docs/share.md").read_text(encoding="utf-8")
ENDPOINT, BUCKET = "https://s3.example.org", "kd-results"
FILES = ("dvc.yaml", "data.dvc", ".dvcignore", ".gitignore", "kd", "reviews")
MINI = Path("artifacts/mini")
ACCOUNT = {"AWS_ACCESS_KEY_ID": "publisher", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}


def lines(start: str, section: str) -> list[str]:
    """The command lines of a section of the page that begin so, descriptions left out."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith(f"    {start}")]
    assert found, (start, section)
    return found


class Storage:
    """An S3 server with a bucket that its owner alone may read."""

    def __init__(self) -> None:
        import boto3

        self.moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        self.url = "http://{}:{}".format(*self.moto.get_host_and_port())
        keys = {"aws_access_key_id": "publisher", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        self.client: Any = boto3.client("s3", endpoint_url=self.url, **keys)
        self.client.create_bucket(Bucket=BUCKET)

    def open_to_all(self) -> None:
        """Give the bucket the page's policy."""
        policy = re.search(r"```json\n(.+?)```", PAGE, re.DOTALL)
        assert policy
        document = json.loads(policy[1])
        # moto has a name of its own for what AWS counts as GetObject, and takes for one what it does not.
        document["Statement"][0]["Action"] += ["s3:HeadObject"]
        self.client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(document))

    def close_again(self) -> None:
        self.client.delete_bucket_policy(Bucket=BUCKET)

    @property
    def objects(self) -> set[str]:
        """The checksums of the files in the bucket."""
        listed = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {"".join(one["Key"].split("/")[-2:]) for one in listed}


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    with pytest.MonkeyPatch.context() as variables:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            variables.delenv(name)
        variables.setenv("AWS_EC2_METADATA_DISABLED", "true")
        started = Storage()
        yield started
        started.moto.stop()


def dvc(folder: Path, line: str, storage: Storage, **variables: str) -> int:
    """Run a command line of the page in a folder; DVC's exit status."""
    from dvc.cli import main

    program, *arguments = line.replace(ENDPOINT, storage.url).split()
    assert program == "dvc"
    with chdir(folder), pytest.MonkeyPatch.context() as here:
        for name, value in variables.items():
            here.setenv(name, value)
        return main(arguments)


def git(*arguments: str | Path) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def published(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with made-up results in the places of every stage's, committed, and pushed as the page says."""
    folder = tmp_path_factory.mktemp("publisher")
    for name in FILES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / name)
    shutil.copytree(REPOSITORY / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    params = YAML(typ="safe").load(REPOSITORY / "profiles/mini.yaml")
    keep(params, "base-kd", "fine-tuning", "no-distillation")
    YAML().dump(params, folder / "params.yaml")
    with chdir(folder):
        git("init", "--quiet")
        made = [stage.target for stage in stages_of(load_config(Path("params.yaml")))]
        for target in [*made, MINI / "attention", Path("data")]:
            file = target if target.suffix else target / "file"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"what {target} holds\n")
        for name in ("data", "teacher", "student"):  # what other stages read
            (MINI / f"inputs/{name}.json").write_text(name)
        for name in ("train", "test"):
            (MINI / f"data/{name}.jsonl").write_text(name)
        (MINI / "report/results.json").write_text("{}")
    assert dvc(folder, "dvc commit --force --quiet", storage) == 0
    for line in lines("dvc remote", "Once: the bucket and two remotes"):
        assert dvc(folder, line, storage) == 0
    (push,) = lines("dvc push", "Publish")
    assert dvc(folder, push, storage, **ACCOUNT) == 0
    with chdir(folder):
        git("add", "--all")
        git("commit", "--quiet", "--message", "results")
    return folder


@pytest.fixture
def reader(published: Path, storage: Storage, tmp_path: Path) -> Iterator[Path]:
    """Somebody else's clone, without an account, once the bucket is open."""
    clone = tmp_path / "clone"
    git("clone", "--quiet", published, clone)
    storage.open_to_all()
    yield clone
    storage.close_again()


def test_one_student_is_pulled_by_anybody_and_nothing_else(reader: Path, published: Path, storage: Storage) -> None:
    one, more, _ = lines("dvc pull", "Read")[:3]
    storage.close_again()
    assert dvc(reader, one, storage) != 0
    assert not (reader / "artifacts").exists()
    storage.open_to_all()
    assert dvc(reader, one, storage) == 0
    assert contents(reader / "artifacts") == {
        Path("mini/adapters/base-kd-1/file"): b"what artifacts/mini/adapters/base-kd-1 holds\n"
    }
    assert dvc(reader, more, storage) == 0
    assert {path.parts[1] for path in contents(reader / "artifacts")} == {"adapters", "logs", "report"}
    assert contents(reader / MINI / "report") == contents(published / MINI / "report")


def test_what_may_not_be_passed_on_is_in_no_bucket(published: Path, storage: Storage) -> None:
    lock = YAML(typ="safe").load(published / "dvc.lock")["stages"]
    of = {name: stage["outs"][0]["md5"] for name, stage in lock.items()}
    named = set(lines("dvc push", "Publish")[0].split())
    there = {name for name in of if of[name] in storage.objects}
    assert there == {name for name in of if name.partition("@")[0] in named}
    assert not {name for name in there if name.startswith(("teacher", "head"))}

    logs = YAML(typ="safe").load(published / "data.dvc")["outs"][0]["md5"]
    assert (published / ".dvc/cache/files/md5" / logs[:2] / logs[2:]).exists()
    assert dvc(published, "dvc push --remote upload data.dvc", storage, **ACCOUNT) == 0
    assert logs not in storage.objects
    audit = YAML(typ="safe").load(REPOSITORY / "audit/dvc.yaml")["stages"]["audit"]
    assert audit["outs"] == [{"artifacts/audit": {"push": False}}]


def test_the_bucket_is_read_as_plain_files_too(reader: Path, storage: Storage) -> None:
    for line in [*lines("dvc remote", "Read"), lines("dvc pull --remote", "Read")[0]]:
        assert dvc(reader, line, storage) == 0
    assert (reader / MINI / "adapters/base-kd-1/file").exists()


@pytest.mark.often
def test_the_images_session_pushes_and_pulls(published: Path, storage: Storage, tmp_path: Path) -> None:
    """nox in a folder set up as the Dockerfile does: no Git, DVC's cache and the state in the volume, links to it."""
    image, state = tmp_path / "kd", tmp_path / "opt/state"
    for name in ("dvc.yaml", "data.dvc", ".dvcignore", "kd", "artifacts", ".dvc"):
        copy = shutil.copytree if (published / name).is_dir() else shutil.copy
        copy(published / name, image / name) if image.exists() else (
            image.mkdir(),
            copy(published / name, image / name),
        )
    shutil.copy(REPOSITORY / "noxfile.py", image)
    (image / ".dvc/config.local").write_text("[core]\n    no_scm = true\n[cache]\n    dir = ../artifacts/.cache\n")
    shutil.move(image / ".dvc/cache", image / "artifacts/.cache")
    state.mkdir(parents=True)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(published / name, state)
        (image / name).symlink_to(f"artifacts/.state/{name}")
    programs = tmp_path / "opt/venv/bin"
    programs.mkdir(parents=True)
    (programs / "dvc").symlink_to(Path(sys.executable).with_name("dvc"))
    stored = storage.objects
    for key in stored:
        storage.client.delete_object(Bucket=BUCKET, Key=f"dvc/files/md5/{key[:2]}/{key[2:]}")
    assert not storage.objects

    def session(*arguments: str) -> None:
        command = [sys.executable, "-m", "nox", "--session", "dvc", "--", *arguments]
        variables = environment() | ACCOUNT | {"KD_ENVIRONMENT": str(tmp_path / "opt/venv")}
        done = subprocess.run(command, cwd=image, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    (push,) = re.findall(r"kd:cpu dvc -- (push .+)", PAGE)
    session(*push.split())
    assert storage.objects
    shutil.rmtree(image / "artifacts/mini")
    shutil.rmtree(image / "artifacts/.cache")
    storage.open_to_all()
    session("pull", "train@base-kd-1")
    assert (image / MINI / "adapters/base-kd-1/file").exists()
