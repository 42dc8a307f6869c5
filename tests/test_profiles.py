"""Every profile as a pipeline: its stages hang together, and DVC's own commands work on it before anything has run."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from dvc.cli import main as dvc
from dvc.repo import Repo
from dvc.stage import PipelineStage

from kd.cli import parser
from kd.config import Config, load_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # DVC's own

PROFILES = sorted(path.stem for path in (REPOSITORY / "profiles").glob("*.yaml"))


@pytest.fixture(scope="module", params=PROFILES)
def profile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A working folder switched to one profile, in which nothing has run."""
    folder = tmp_path_factory.mktemp("profile")
    for name in ("kd", "reviews"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copy(REPOSITORY / "profiles" / f"{request.param}.yaml", folder / "params.yaml")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        Repo.init(no_scm=True).close()
        yield load_config(Path("params.yaml"))


@pytest.fixture(scope="module")
def stages(profile: Config) -> list[PipelineStage]:
    """Its stages, as DVC reads them."""
    del profile
    with Repo() as repo:
        return list(repo.index.stages)


def test_stages_hang_together(profile: Config, stages: list[PipelineStage]) -> None:
    made = [Path(out.def_path) for stage in stages for out in stage.outs]
    names = {stage.addressing for stage in stages}
    assert {f"teacher@{name}" for name in profile.prompts} <= names
    kinds = dict.fromkeys(profile.untrained, "-untrained") | dict.fromkeys(profile.controls, "-control")
    kinds |= {f"{name}-kd": "" for name in profile.prompts}
    for stage, runs in (("train", profile.adapters), ("assess", profile.experiments)):
        assert {f"{stage}{kinds[one.student]}@{run}" for run, one in runs.items()} <= names
    for stage in stages:
        python, m, kd, *arguments = shlex.split(stage.cmd)
        assert [python, m, kd] == ["python", "-m", "kd"]  # the code of the folder, whichever kd is installed
        parser().parse_args(arguments)  # ends the test where the command line would refuse it
        for dep in stage.deps:
            path = Path(dep.def_path)
            related = any(path == out or path in out.parents or out in path.parents for out in made)
            assert related or path.exists(), f"{stage.addressing} reads {path}, which nothing makes"
        for out in stage.outs:
            assert profile.artifacts in Path(out.def_path).parents


@pytest.mark.parametrize("command", ["dag", "metrics show", "plots show"])
@pytest.mark.usefixtures("profile")
def test_dvcs_own_commands_work(command: str) -> None:
    assert dvc(command.split()) == 0


def test_a_dry_run_walks_every_stage(profile: Config, stages: list[PipelineStage]) -> None:
    with Repo() as repo:
        walked = {stage.addressing for stage in repo.reproduce(dry=True, force=True)}
    assert walked == {stage.addressing for stage in stages}
    assert not profile.artifacts.exists()
