"""``python -m recipes.pretrain``: trains a small MoE language model in FP8 beside its BF16 twin."""

from __future__ import annotations

import os
import sys

# Before the first CUDA call: cuBLAS takes its deterministic workspace from here.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from .cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
