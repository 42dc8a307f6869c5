"""What the server of `forked` does before it forks anything: it reads the stages' code, as each process would for the
key of its result, and keeps the garbage collector from going through what it has imported."""

import gc

from kd.fingerprint import code_sha256

for stage in "teacher.capture distill.train distill.search distill.cohort assess.run".split():
    code_sha256(f"kd.{stage}")
gc.freeze()
