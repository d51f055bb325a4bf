"""Real text as windows of tokens, with the model's own tokenizer or as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.pretrain.config import Config, UserError
from recipes.pretrain.data import FILE_END, Corpus, load_corpus

from .settings import Settings


class Windows(Dataset):
    """Back-to-back windows of a token stream: input_ids and labels, int64 (seq_len,) each.

    Args:
        limit: at most this many windows, spread evenly over the stream.
    """

    def __init__(self, stream: Tensor, seq_len: int, limit: int | None = None) -> None:
        self.stream, self.seq_len = stream, seq_len
        self.available = stream.numel() // seq_len
        self.count = self.available if limit is None else min(limit, self.available)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        start = i * self.available // self.count * self.seq_len
        ids = self.stream[start : start + self.seq_len].long()
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Text:
    """A text as windows to learn from and windows held out, and where it came from."""

    train: Windows
    valid: Windows
    summary: dict[str, Any]


def _corpus(settings: Settings) -> Corpus:
    return load_corpus(
        Config(
            data=settings.data,
            pattern=settings.pattern,
            valid_fraction=settings.valid_fraction,
            seq_len=settings.seq_len,
            batch_size=settings.batch_size,
            grad_accumulation=settings.grad_accumulation,
        )
    )


def _tokenize(stream: Tensor, tokenizer: Any, wanted: int) -> Tensor:
    """The first `wanted` tokens of a stream of bytes, file by file, an end token after each."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for file in bytes(stream.numpy()).split(bytes([FILE_END])):
        if len(ids) >= wanted:
            break
        ids += tokenizer(file.decode(errors="replace"), add_special_tokens=False)["input_ids"]
        if end is not None:
            ids.append(end)
    return torch.tensor(ids[:wanted], dtype=torch.int32)


def load_text(settings: Settings, tokenizer: Any | None) -> Text:
    """Reads the text of a run.

    Args:
        tokenizer: of the model; None: tokens are bytes.

    Raises: UserError where there is no text, or not enough for a step and an evaluation.
    """
    corpus = _corpus(settings)
    train, valid = corpus.train, corpus.valid
    if tokenizer is not None:
        train = _tokenize(train, tokenizer, settings.steps * settings.tokens_per_step)
        valid = _tokenize(valid, tokenizer, settings.eval_sequences * settings.seq_len)
    text = Text(
        Windows(train, settings.seq_len),
        Windows(valid, settings.seq_len, settings.eval_sequences),
        corpus.summary() | {"tokens": "bytes" if tokenizer is None else type(tokenizer).__name__},
    )
    needed = settings.batch_size * settings.grad_accumulation
    if len(text.train) < needed or len(text.valid) == 0:
        raise UserError(
            f"--data: expected {needed} sequences of {settings.seq_len} tokens to learn from and "
            f"one held out, got {len(text.train)} and {len(text.valid)}"
        )
    return text
