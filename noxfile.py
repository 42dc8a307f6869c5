"""Sessions around the pipeline. `nox -s mini` is the main job, `nox -s tests` the tests; `nox -l` lists all.

Every session shares one environment, .nox/kd (several gigabytes), installed from requirements.lock with
hashes checked. nox itself would make one per session, so the sessions run with `python=False` and `use` it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["tests"]

LOCK, PYTHON = "requirements.lock", "3.11"
IMAGE_ENVIRONMENT = os.environ.get("KD_ENVIRONMENT")  # the image's own, complete and not to be written to
ENVIRONMENT = Path(IMAGE_ENVIRONMENT or ".nox/kd").resolve()
NODE, AXE = ".nox/npm", "axe-core@4.14.1"  # checks pages for accessibility; used by the tests alone


def environment(session: nox.Session) -> None:
    """Bring the shared environment to the lock file (a second where nothing changed) and enter it."""
    if not IMAGE_ENVIRONMENT and not at_home(ENVIRONMENT):
        if ENVIRONMENT.exists():
            session.warn(f"{ENVIRONMENT}: not made here with Python {PYTHON} (a moved or copied checkout?); made anew")
            shutil.rmtree(ENVIRONMENT)
        session.run("uv", "venv", "--quiet", "--python", PYTHON, str(ENVIRONMENT))
    os.environ["VIRTUAL_ENV"] = str(ENVIRONMENT)
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # without bytecode every stage compiles torch's sources anew
    os.environ["PATH"] = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"  # nox looks programs up here
    if IMAGE_ENVIRONMENT:
        bring_state(session)
        return
    install = ("uv", "pip", "install", "--quiet", "--no-deps")
    session.run(*install, "--require-hashes", "--requirement", LOCK)
    session.run(*install, "--no-build-isolation", "--editable", ".")
    do_without_git(session)


def at_home(environment: Path) -> bool:
    """Whether an environment was made where it lies: its scripts and `activate` name that place, so that one which was
    moved does not start, and one which was copied enters the original."""
    try:
        made = re.search(r"^VIRTUAL_ENV=(.+)$", (environment / "bin/activate").read_text("utf-8"), re.MULTILINE)
        of = re.search(r"^version\w* *= *(.+)$", (environment / "pyvenv.cfg").read_text("utf-8"), re.MULTILINE)
        here = made is not None and environment.samefile(shlex.split(made[1])[0])
    except (OSError, ValueError):  # half an environment, or an `activate` of another make
        return False
    return here and of is not None and of[1].startswith(f"{PYTHON}.") and (environment / "bin/python").exists()


def do_without_git(session: nox.Session) -> None:
    """Let DVC do without Git where this folder is no repository of its own, such as a ZIP from a website."""
    git, settings = Path(".git"), Path(".dvc/config.local")
    if git.is_file() or (git / "HEAD").exists() or (settings.exists() and "no_scm" in settings.read_text("utf-8")):
        return
    session.run("dvc", "config", "--local", "core.no_scm", "true")


def bring_state(session: nox.Session) -> None:
    """In the image params.yaml, dvc.lock and the reviews are links into artifacts/, so that they survive with it. A
    volume begins with the image's. A params file mounted at /params.yaml stands for the volume's."""
    kept = Path("artifacts/.state")
    try:
        kept.mkdir(exist_ok=True)
        for origin in sorted((ENVIRONMENT.parent / "state").iterdir()):
            if not (kept / origin.name).exists():
                copy = shutil.copytree if origin.is_dir() else shutil.copy
                copy(origin, kept / origin.name)
        given, params = Path("/params.yaml"), Path("params.yaml")
        params.unlink(missing_ok=True)
        params.symlink_to(given if given.exists() else kept / "params.yaml")
    except OSError as error:
        session.error(
            f"artifacts/ cannot be written ({error.strerror}); let user {os.getuid()} write to the folder mounted "
            "there, or run as its owner: docker run --user $(id -u)"
        )


def demand(session: nox.Session, *programs: str) -> None:
    """End a session that needs what the image leaves out."""
    absent = [program for program in programs if not shutil.which(program)]
    if IMAGE_ENVIRONMENT and absent:
        session.error(f"the image has no {', '.join(absent)}; run this session in a checkout, as CONTRIBUTING.md says")


@nox.session(python=False)
def lock(session: nox.Session) -> None:
    """Resolve pyproject.toml anew into requirements.lock (hashes, all platforms, no index addresses)."""
    session.run(
        "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--universal", "--python-version", PYTHON,
        "--generate-hashes", "--no-emit-index-url", "--no-annotate", "--custom-compile-command", "nox -s lock",
        "--override", "lock-overrides.txt", "--output-file", LOCK, "--quiet", *session.posargs,
    )  # fmt: skip


def reproduce(session: nox.Session, profile: str | None = None) -> None:
    """Run a profile's pipeline (params.yaml as it stands without one) and print its table. Stages that are up to date
    do not run again. Several GPUs, or the cores where there is none, train and assess side by side; with arguments for
    DVC, one stage runs at a time."""
    environment(session)
    profile = switch(session, profile)
    if gpus() != 1 and not session.posargs:
        session.run("kd", "students")
    else:
        assessed = ("assess", "assess-control", "assess-untrained")
        session.run("dvc", "repro", *session.posargs, *assessed, "statistics")
    # The table is printed once, below; what it depends on has just been run.
    session.run("dvc", "repro", *session.posargs, "--single-item", "report", silent=True)
    session.run("cat", f"artifacts/{profile}/report/results.md")


def gpus() -> int:
    """How many GPUs seem to be visible. `kd students` counts them as torch does, which takes seconds."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(list(Path("/dev").glob("nvidia[0-9]*")) if named is None else list(filter(None, named.split(","))))


def switch(session: nox.Session, profile: str | None) -> str:
    """Make params.yaml the profile's, unless it is that already, changed or not; returns the profile that it has."""
    params = Path("params.yaml").read_text(encoding="utf-8")
    found = re.search(r"^profile: *([a-z0-9-]+)", params, re.MULTILINE)
    if found and profile in (None, found[1]):
        return found[1]
    if profile is None:
        session.error("params.yaml: no line `profile: <name>`; profiles/mini.yaml shows what belongs there")
    if params not in (path.read_text(encoding="utf-8") for path in Path("profiles").glob("*.yaml")):
        mend = f"keep it elsewhere, then `cp profiles/{profile}.yaml params.yaml`"
        session.error(f"params.yaml is changed; {'leave it out' if IMAGE_ENVIRONMENT else mend}, or run it by `repro`")
    shutil.copyfile(f"profiles/{profile}.yaml", "params.yaml")
    return profile


@nox.session(python=False)
def repro(session: nox.Session) -> None:
    """params.yaml as it stands, its pipeline and its table: whatever of it is out of date."""
    reproduce(session)


@nox.session(python=False)
def mini(session: nox.Session) -> None:
    """The whole experiment in miniature, on a CPU, and its table."""
    reproduce(session, "mini")


@nox.session(python=False)
def paper(session: nox.Session) -> None:
    """The paper's own settings: a 405B teacher on four GPUs. Says what is missing before it begins."""
    reproduce(session, "paper")


@nox.session(python=False, name="single-gpu")
def single_gpu(session: nox.Session) -> None:
    """The same method on one GPU of 24 to 80 GB: a smaller teacher, Llama 3.2 1B as student."""
    reproduce(session, "single-gpu")


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Every test; arguments go to pytest (`nox -s tests -- -k store -x`)."""
    environment(session)
    # One process a core, and one thread in each: torch's threads wait for each other where there are more than cores.
    # A file stays in one process: its tests share what they make. (Marks of groups are lost with pytest 9.2.0 and
    # xdist 3.8.0, silently.) Files are begun in the order that tests/conftest.py gives them.
    spread = ("--numprocesses", "logical", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder")
    session.run("pytest", *spread, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=False)
def gpu(session: nox.Session) -> None:
    """The tests of what runs on a GPU, which skip themselves where there is none; arguments go to pytest."""
    environment(session)
    session.run("pytest", "-ra", "tests/gpu", *session.posargs)


@nox.session(python=False)
def extractor(session: nox.Session) -> None:
    """The extractor's suite alone; arguments go to pytest."""
    environment(session)
    suite = ("test_extract.py", "test_rule_sets.py", "test_robust.py", "test_review.py")
    session.run("pytest", *(f"tests/scoring/{file}" for file in suite), *session.posargs)


@nox.session(python=False)
def browser(session: nox.Session) -> None:
    """The report's page in Chromium, which has to be installed (and npm, for axe); arguments go to pytest."""
    environment(session)
    demand(session, "playwright")
    if shutil.which("npm"):
        session.run(
            "npm", "install", "--silent", "--no-save", "--no-package-lock", "--prefix", NODE, AXE, external=True
        )
    session.run("pytest", "-m", "browser", "-s", "tests/browser", *session.posargs)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """ruff (style and format), mypy (strict) and hadolint."""
    environment(session)
    demand(session, "ruff", "mypy", "hadolint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("hadolint", "Dockerfile")


def stage(session: nox.Session, name: str, *others: str) -> None:
    """Run `kd <name>` with the session's arguments, or without any the pipeline's stages of that name, and `others`."""
    environment(session)
    if session.posargs:
        session.run("kd", name, *session.posargs)
    else:
        session.run("dvc", "repro", name, *others)


@nox.session(python=False)
def teacher(session: nox.Session) -> None:
    """Teacher inference: `nox -s teacher -- base` captures one prompt; without arguments, whatever is out of date."""
    stage(session, "teacher")


@nox.session(python=False)
def train(session: nox.Session) -> None:
    """Training: `nox -s train -- teacher-kd` trains one student; without arguments, whatever is out of date."""
    stage(session, "train", "train-control")


@nox.session(python=False)
def assess(session: nox.Session) -> None:
    """Assessment: `nox -s assess -- teacher-kd` asks one student; without arguments, whatever is out of date."""
    stage(session, "assess", "assess-control", "assess-untrained")


@nox.session(python=False)
def report(session: nox.Session) -> None:
    """Score the logs that are there and print the table."""
    environment(session)
    session.run("kd", "report", *session.posargs)


@nox.session(python=False)
def attention(session: nox.Session) -> None:
    """How the students attend: `nox -s attention -- --heads 3:5` draws heads; without arguments the stage."""
    stage(session, "attention")


@nox.session(python=False)
def audit(session: nox.Session) -> None:
    """Score the paper's own logs again, fetching them first where they are missing; arguments go to `kd audit`."""
    environment(session)
    session.run("kd", "data", "fetch")
    if session.posargs:
        session.run("kd", "audit", *session.posargs)
        return
    session.run("dvc", "repro", "audit/dvc.yaml", silent=True)  # what it prints is shown once, below
    session.run("cat", "artifacts/audit/audit.txt")


@nox.session(python=False)
def dvc(session: nox.Session) -> None:
    """DVC itself, for the image, where sessions are what is run: `nox -s dvc -- push -r upload train`."""
    environment(session)
    session.run("dvc", *session.posargs)


@nox.session(python=False)
def image(session: nox.Session) -> None:
    """Build the Docker image and try it; `nox -s image -- cpu` the one without the compiled extension.

    It is tried as it should be used: no network, nothing writable but its volumes.
    """
    target = session.posargs[0] if session.posargs else "gpu"
    if target not in ("cpu", "gpu"):
        session.error(f"there is no target {target!r} in the Dockerfile; say cpu or gpu")
    engine = next((name for name in ("docker", "podman", "buildah") if works(name)), None)
    if engine is None:
        session.error("neither docker, podman nor buildah works here; start Docker's daemon or install one of them")
    tag = f"kd:{target}"
    asked = ("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changed")
    revision = subprocess.run(asked, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    build = ("--target", target, "--tag", tag, "--build-arg", f"REVISION={revision}", ".")
    session.run(engine, "build", *build, external=True, env={"DOCKER_BUILDKIT": "1"})
    if engine == "buildah":
        name = session.run(engine, "from", tag, external=True, silent=True)
        run = (engine, "run", "--user", "1000", str(name).strip(), "--")
    else:
        run = (engine, "run", "--rm", "--network", "none", "--read-only", "--entrypoint", "", tag)
    for command in (("pip", "check"), ("kd", "doctor"), ("nox", "--session", "mini")):
        session.run(*run, *command, external=True)


def works(engine: str) -> bool:
    """Whether a container engine is there and answers; Docker's client may be without its daemon."""
    return bool(shutil.which(engine)) and subprocess.run((engine, "info"), capture_output=True).returncode == 0
