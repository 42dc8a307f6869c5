"""Completion in the shell: of prompts, students and runs as params.yaml has them, of files elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import argcomplete
from argcomplete.completers import BaseCompleter, FilesCompleter

from kd.config import Config, load_config
from kd.errors import UserError


class Names(BaseCompleter):
    """What may stand for an argument."""

    def __call__(
        self, *, prefix: str, action: argparse.Action, parser: argparse.ArgumentParser, parsed_args: argparse.Namespace
    ) -> Iterable[str]:
        if action.dest not in ("prompt", "student", "run_name"):
            return FilesCompleter()(prefix)
        try:
            config = load_config(getattr(parsed_args, "params", None) or Path("params.yaml"))
        except UserError:  # the command itself will say it
            return ()
        return names(config, parser.prog.split()[-1], action.dest)


def names(config: Config, command: str, argument: str) -> Iterable[str]:
    """The names that a command takes for its `prompt`, `student` or `run_name`."""
    if argument == "prompt":
        return config.prompts
    if command == "search":
        return [student for student, prompt in config.students.items() if prompt is not None]
    known = config.adapters if command == "train" else config.experiments
    students = [one.student for one in known.values()] if argument == "student" else []
    return dict.fromkeys([*students, *known])


def complete(line: argparse.ArgumentParser) -> None:
    """Tell the shell how the words typed so far may go on, and end the process."""
    argcomplete.autocomplete(line, always_complete_options=False, default_completer=Names())
