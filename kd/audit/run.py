"""`kd audit`: the published logs scored again."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from kd.audit.findings import findings, score
from kd.audit.logs import LOGS, TRUTH, is_published, read_log, rows_right
from kd.audit.page import SLOW, prepare, write
from kd.errors import UserError
from kd.io.progress import progress
from kd.scoring.comparison import as_rows, compare_family
from kd.scoring.extract import RULE_SETS, extract, extract_one


def audit(data: Path, folder: Path | None = None) -> dict[str, Any]:
    """Score the logs in the folder `data` again; the document that `kd audit --json` prints. Where a `folder` is
    given, audit.json, audit.txt, charts and the page are written into it."""
    for given in (data, folder):
        if given and given.is_file():
            raise UserError(f"{given}: is a file; name a folder")
    logs = {name: read_log(data, name) for name in LOGS}
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["math_verify"])  # takes seconds to import: once for all of them
    responses = [response for log in logs.values() for response in log.responses]
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=processes) as pool:
        # Math-Verify takes milliseconds a row, so it runs beside everything else.
        slow = pool.map(extract_one, responses, repeat(SLOW), chunksize=128)
        extractions = {
            name: {rules: list(extract(log.responses, rules)) for rules in RULE_SETS if rules != SLOW}
            for name, log in logs.items()
        }
        right = {name: rows_right(log, extractions[name]["notebook"]) for name, log in logs.items()}
        compared = compare_family(combinations(right, 2), {name: np.array(rows) for name, rows in right.items()})
        prepared = prepare(logs, extractions, right) if folder else None
        found = iter(progress(slow, f"audit, {SLOW}", "row", len(responses)))
        for name, log in logs.items():
            extractions[name][SLOW] = list(islice(found, len(log.responses)))
    experiments = {name: score(name, log, extractions[name]) for name, log in logs.items()}
    document = {
        "data": {file: is_published(data / file) for file in sorted([*LOGS.values(), TRUTH])},
        "experiments": experiments,
        "comparisons": as_rows(compared),
        "findings": findings(logs, extractions, experiments),
    }
    if folder and prepared:
        write(document, prepared, folder)
    return document
