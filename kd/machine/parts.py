"""Parts of an experiment, done by the stages' own code on stand-ins for its models, and measured.

A part is a process of its own, as a stage is: `python -m kd.machine.parts TASK.json`, in a folder that has the rows
and the stand-ins. It writes what it found beside its task.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from kd.config import Config
from kd.errors import UserError, WorkFailedError
from kd.machine.measure import GIB, clock
from kd.machine.part_student import assess, train
from kd.machine.part_teacher import head, teacher
from kd.machine.record import write_record

# What stages begin with. Of an environment's first process they cost some seconds more: nothing of them is in memory,
# and often (uv's way) not compiled to bytecode either. That is not of each stage.
LIBRARIES = ("torch._dynamo", "transformers.models.llama.modeling_llama", "peft", "dvclive", "dvc.repo.experiments")
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>: the signal that a process gets when its parent ends


def look(task: dict[str, Any]) -> dict[str, Any]:
    """The GPUs of this machine; and where those that are needed are here, its libraries, so that no part is the first
    one to read them."""
    import torch

    found = [torch.cuda.get_device_properties(gpu) for gpu in range(torch.cuda.device_count())]
    start = clock()
    if found or not task["gpus"]:
        for library in LIBRARIES:
            import_module(library)
    return {"gpus": [{"name": gpu.name, "gib": gpu.total_memory / GIB} for gpu in found], "measured_s": clock() - start}


def rest(params: Config, task: dict[str, Any]) -> dict[str, Any]:
    """`kd statistics` of the store that is here."""
    from kd.analysis.certainty import measure_prompts

    start = clock()
    measure_prompts(params.model_copy(update={"prompts": {task["prompt"]: params.prompts[task["prompt"]]}}))
    return {"measured_s": clock() - start}


PARTS = {work.__name__: work for work in (head, teacher, train, assess, rest)}


def _done(task: dict[str, Any]) -> dict[str, Any]:
    """What a task finds; a record is kept of it, as of every command that makes something."""
    params, began = Config.model_validate(task["params"]), datetime.now().astimezone()
    found = PARTS[task["part"]](params, task)
    write_record(params, task["part"], began)
    return found | {"compiled_s": clock.compiled}


def main() -> None:
    """Do the task of a file; its result, or why it was refused, comes beside it."""
    file = Path(sys.argv[1])
    task = json.loads(file.read_text())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever waits may be killed, or lose its terminal
    try:
        found = look(task) if task["part"] == "look" else _done(task)
    except (UserError, WorkFailedError) as error:
        found = {"refused": str(error)}
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        found = {"refused": "out of memory: " + " ".join(str(error).split())[:200], "memory": True}
    found["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file.with_suffix(".found"))


if __name__ == "__main__":
    main()
