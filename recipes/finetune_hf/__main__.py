"""``python -m recipes.finetune_hf``: fine-tunes a Hugging Face MoE model with FP8 experts."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
