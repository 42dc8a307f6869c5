"""`kd <command>`: the stages of the pipeline. Heavy libraries are imported only by the stage that runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.errors import UserError

if TYPE_CHECKING:
    from kd.config import Config

EPILOG = """\
The stages in order, as `dvc repro` runs them:
  kd prepare                 the rows of GSM8K, or of the built-in miniature
  kd head                    the teacher's output head, kept once
  kd teacher teacher         the teacher reads the questions behind a prompt
  kd train teacher-kd        a student learns from that prompt's teacher
  kd assess teacher-kd       it answers the test questions
  kd report                  the paper's table

What runs is params.yaml; results lie under artifacts/<profile>/. `cp profiles/paper.yaml params.yaml` switches.
Exit status: 0 done, 1 the work failed, 2 unusable input (the message says what, where and how to mend it).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit status."""
    options = _parser().parse_args(arguments)
    try:
        from kd.config import load_config

        options.run(load_config(options.params), options)
    except UserError as error:
        print(f"kd: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"kd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kd: interrupted; earlier results are as they were, run the same command again", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kd",
        description="Reproduce response-priming distillation (arXiv 2412.17846).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Config, argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--params", type=Path, default=Path("params.yaml"), help="the experiment (params.yaml)")
        sub.set_defaults(run=run)
        return sub

    command("prepare", _prepare, "write the training and test rows to artifacts/<profile>/data")
    command("head", _head, "keep the teacher's final norm and output head, once for all prompts")
    teacher = command("teacher", _teacher, "capture the teacher's states behind one prompt")
    teacher.add_argument("prompt", metavar="PROMPT", help="base, teacher, ground-truth or confidence")
    train = command("train", _train, "train one student's adapter")
    train.add_argument("experiment", metavar="EXPERIMENT", help="a key of `adapters`, such as teacher-kd")
    assess = command("assess", _assess, "let one student answer the test questions")
    assess.add_argument("experiment", metavar="EXPERIMENT", help="a key of `experiments`, such as no-distillation")
    report = command("report", _report, "score every log, write the report and print the table")
    report.add_argument("--json", action="store_true", help="print results.json instead of the table")
    return parser


def _prepare(config: Config, _: argparse.Namespace) -> None:
    from kd.dataset import prepare

    prepare(config.dataset, config.seed, config.artifacts / "data")


def _head(config: Config, _: argparse.Namespace) -> None:
    from kd.teacher.capture import write_head

    write_head(config)


def _teacher(config: Config, options: argparse.Namespace) -> None:
    from kd.config import choose

    choose(options.prompt, config.prompts, "prompt", "prompts")
    from kd.teacher.capture import capture

    capture(config, options.prompt)


def _train(config: Config, options: argparse.Namespace) -> None:
    from kd.config import choose

    choose(options.experiment, list(config.adapters), "experiment", "adapters")
    from kd.distill.train import train

    train(config, options.experiment)


def _assess(config: Config, options: argparse.Namespace) -> None:
    from kd.config import choose

    choose(options.experiment, list(config.experiments), "experiment", "experiments")
    from kd.assess.score import assess

    assess(config, options.experiment)


def _report(config: Config, options: argparse.Namespace) -> None:
    from kd.report.tables import report, table

    results = report(config)
    print(json.dumps(results, indent=1) if options.json else table(results), end="\n" if options.json else "")


if __name__ == "__main__":
    sys.exit(main())
