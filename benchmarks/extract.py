"""Rows per second of the documented rules, beside the notebook's way of extracting: a pandas frame, row by row.

    python benchmarks/extract.py [data/published]

The notebook's loop (assessment/assess.ipynb) is written anew here: it walks `DataFrame.iterrows`, runs its regular
expressions on each response and stores each number with `DataFrame.loc`. Both read the same responses in the same run,
five times in turns; medians count.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from result import write_result

from kd.audit.logs import DATA, LOGS
from kd.io.table import read_table
from kd.scoring.extract import extract, without_prompt

ROUNDS = 5
LOOP = "notebook's loop"
NUMBER = r"[-+]?[$]?([,\d]+\.?[,\d]*)\%?(\ |$|\n|.){1}"


def notebook_loop(responses: list[str]) -> pd.DataFrame:
    """The original's algorithm over a frame of responses."""
    frame = pd.DataFrame({"model_answer": responses})
    frame["taken"] = frame["model_answer"]
    earlier: list[tuple[str, str]] = []
    for i, row in frame.iterrows():
        text = row["model_answer"]
        boxed = re.findall(r"oxed{ *([,\d]+\.?[,\d]*) *}", text)
        line = re.findall(NUMBER, text.split("\n")[0])
        phrase = re.findall(r"(the ?(final|correct)* ?answer ?is)", text)
        behind = re.findall(NUMBER, text[text.find(phrase[0][0]) :]) if phrase else []
        if boxed:
            number = boxed[0]
        elif len({digits for digits, _ in line}) == 1:
            number = line[0][0]
        elif behind:
            number = earlier[0][0]
        else:
            earlier = re.findall(NUMBER, text)
            if not earlier:
                continue
            number = earlier[-1][0]
        try:
            frame.loc[i, "taken"] = float(number.replace(",", ""))
        except ValueError:
            frame.loc[i, "taken"] = text
    return frame


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    responses = []
    for file in LOGS.values():
        rows = read_table(folder / file, ["question", "model_answer"])
        raw = file == LOGS["confidence-kd"]
        responses += [without_prompt(row["model_answer"], row["question"] if raw else "") for row in rows]
    times: dict[str, list[float]] = {LOOP: [], "documented": [], "notebook rules": [], "robust": []}
    for _ in range(ROUNDS):
        times[LOOP].append(seconds(lambda: notebook_loop(responses)))
        for name, rules in (("documented", "documented"), ("notebook rules", "notebook"), ("robust", "robust")):
            times[name].append(seconds(lambda rules=rules: list(extract(responses, rules))))  # type: ignore[misc]
    rates = {name: [len(responses) / taken for taken in values] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{len(responses)} responses, {sum(map(len, responses)) / 1e6:.1f} MB, {ROUNDS} rounds\n")
    print(f"{'':<16}  {'rows/s':>9}  {'least to most':>19}  {'times':>6}")
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:<16}  {medians[name]:>9,.0f}  {spread:>19}  {medians[name] / medians[LOOP]:>6.1f}")
    write_result(
        "extract",
        {"rows_per_s": medians["documented"], "speedup": medians["documented"] / medians[LOOP]},
        {name: {"median": medians[name], "values": values} for name, values in rates.items()},
    )


if __name__ == "__main__":
    main()
