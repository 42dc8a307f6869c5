"""Response-priming distillation (arXiv 2412.17846), rerunnable."""

import os

# Without it torch refuses cuBLAS where it is to be deterministic (kd/distill/step.py), and it looks but once, at the
# process's first product on a GPU, whatever that is for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
