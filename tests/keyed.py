"""What the server of `forked` imports last: the stages' code is read, as each process would read it for its key."""

from kd.fingerprint import code_sha256

for stage in "teacher.capture distill.train distill.search distill.cohort assess.run".split():
    code_sha256(f"kd.{stage}")
