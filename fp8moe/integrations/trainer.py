"""Low-rank updates of frozen experts in the checkpoints of transformers' Trainer.

The Trainer saves of a PEFT model what PEFT calls its adapters, which the experts' updates are not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fp8moe.integrations.adapters import load_adapters, save_adapters

FOLDER = Path("fp8moe", "experts")  # one level down the Trainer would take it for PEFT's


def adapter_checkpoints() -> Any:
    """A callback with which the Trainer saves and restores the updates of frozen experts.

        Trainer(model, args, callbacks=[adapter_checkpoints()], ...)

    Every checkpoint-<step> of `args.output_dir` gets a folder fp8moe/experts from `save_adapters`.
    It is loaded when training resumes from that checkpoint, and at the end if the best is wanted.

    Raises: ImportError without transformers. The callback, before the first resumed step:
        FileNotFoundError or ValueError as `load_adapters`, for a checkpoint without that folder,
        say, or one that is not in `args.output_dir`.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "adapter_checkpoints needs transformers: pip install 'fp8moe[hf]'"
        ) from error

    class AdapterCheckpoints(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if args.should_save:
                folder = Path(args.output_dir, f"checkpoint-{state.global_step}", FOLDER)
                if folder.exists():  # the Trainer has just overwritten the rest of this checkpoint
                    shutil.rmtree(folder)
                save_adapters(model, folder)

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if state.global_step > 0:
                checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
                load_adapters(model, checkpoint / FOLDER)

        def on_train_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                load_adapters(model, Path(state.best_model_checkpoint, FOLDER))

    return AdapterCheckpoints()
