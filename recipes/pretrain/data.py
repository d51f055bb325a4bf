"""Text as one stream of bytes, and the order in which a run reads it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import Config, UserError
from .parallel import Ranks

FILE_END = 0  # a byte that text does not hold: it ends every file in the stream
RESIDENT_BYTES = 8 << 30  # a longer stream stays in host memory and is copied batch by batch


@dataclass(frozen=True)
class Corpus:
    """The bytes of a text, split by file into what is learned and what is held out."""

    source: str
    sha256: str  # of the files' bytes, one after the other in sorted path order
    num_files: int
    num_bytes: int
    entropy: float  # nats per byte of the training stream's byte frequencies
    train: Tensor  # uint8
    valid: Tensor  # uint8

    def summary(self) -> dict[str, str | int | float]:
        return {
            "source": self.source,
            "sha256": self.sha256,
            "files": self.num_files,
            "bytes": self.num_bytes,
            "train_bytes": self.train.numel(),
            "valid_bytes": self.valid.numel(),
            "unigram_entropy": self.entropy,
        }


def find_files(path: Path, pattern: str) -> list[Path]:
    """Files under ``path`` whose name matches, hidden ones left out, sorted by relative path."""
    if path.is_file():
        return [path]
    found = [
        file
        for file in path.rglob(pattern)
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _locate(config: Config) -> tuple[Path, str, str]:
    if config.data is None:
        return Path(torch.__file__).parent, config.pattern or "*.py", f"torch {torch.__version__}"
    path = Path(config.data).expanduser()
    if not path.exists():
        raise UserError(f"--data: no such file or folder: {path}")
    return path, config.pattern or "*", str(path)


def _held_out(names: list[str], sizes: list[int], fraction: float) -> set[int]:
    """Files whose bytes add up to at most ``fraction``, drawn by the hash of their name."""
    budget = int(sum(sizes) * fraction)
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    chosen: set[int] = set()
    for i in order:
        if 0 < sizes[i] <= budget:
            chosen.add(i)
            budget -= sizes[i]
    return chosen


def _stream(parts: list[bytes]) -> Tensor:
    joined = bytearray([FILE_END]).join(parts)
    joined.append(FILE_END)
    return torch.frombuffer(joined, dtype=torch.uint8)


def unigram_entropy(stream: Tensor) -> float:
    """-sum p ln p over byte frequencies: what a model that ignores context can reach, in nats."""
    counts = torch.bincount(stream.to(torch.int32), minlength=256).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


def load_corpus(config: Config) -> Corpus:
    """Reads, hashes and splits the text of a run.

    A folder is split by file; a single file, or a folder whose files are all larger than the
    validation share, gives its last bytes.

    Raises:
        UserError: the path is missing or unreadable, or holds too little text for the config.
    """
    path, pattern, source = _locate(config)
    files = find_files(path, pattern)
    if not files:
        raise UserError(f"--data: no file in {path} matches {pattern!r}")
    digest = hashlib.sha256()
    texts: list[bytes] = []
    for file in files:
        try:
            texts.append(file.read_bytes())
        except OSError as error:
            raise UserError(f"--data: cannot read {file}: {error.strerror}") from error
        digest.update(texts[-1])
    base = path if path.is_dir() else path.parent
    names = [file.relative_to(base).as_posix() for file in files]
    chosen = _held_out(names, [len(text) for text in texts], config.valid_fraction)
    if chosen:
        train = _stream([text for i, text in enumerate(texts) if i not in chosen])
        valid = _stream([text for i, text in enumerate(texts) if i in chosen])
    else:
        whole = _stream(texts)
        cut = int(whole.numel() * (1 - config.valid_fraction))
        train, valid = whole[:cut], whole[cut:]
    _check_size("training", train, config.seq_len * max(2, config.sequences_per_step), config)
    _check_size("validation", valid, config.seq_len, config)
    return Corpus(
        source=source,
        sha256=digest.hexdigest(),
        num_files=len(files),
        num_bytes=sum(len(text) for text in texts),
        entropy=unigram_entropy(train),
        train=train,
        valid=valid,
    )


def _check_size(part: str, stream: Tensor, needed: int, config: Config) -> None:
    if stream.numel() <= needed:
        raise UserError(
            f"--data: too little text for {part}: expected more than {needed} bytes "
            f"(--seq-len {config.seq_len}, {config.sequences_per_step} sequences a step, "
            f"--valid-fraction {config.valid_fraction}), got {stream.numel()}"
        )


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed from several values, so that neighbouring seeds give unrelated numbers."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class DataOrder:
    """Where each sequence of a run starts: a pure function of seed and position.

    An epoch is a permutation of back-to-back windows, shifted by a phase of its own, so that every
    byte is read once an epoch and the windows are new in the next. The position in the data is the
    step, which is all that a checkpoint has to keep.
    """

    def __init__(self, num_bytes: int, seq_len: int, seed: int):
        self.seq_len = seq_len
        self.seed = seed
        # One byte more for the last target; the phase may push the windows by seq_len - 1.
        self.windows = (num_bytes - seq_len) // seq_len
        if self.windows < 1:
            raise ValueError(f"num_bytes: expected at least {2 * seq_len}, got {num_bytes}")
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(mixed_seed("epoch", self.seed, epoch))
            order = torch.randperm(self.windows, generator=generator)
            phase = torch.randint(self.seq_len, (1,), generator=generator)
            self._epochs = {e: s for e, s in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = order * self.seq_len + phase
        return self._epochs[epoch]

    def starts(self, position: int, count: int) -> Tensor:
        """int64 [count]: the first bytes of ``count`` sequences, the first being ``position``."""
        found: list[Tensor] = []
        while count:
            epoch, offset = divmod(position, self.windows)
            part = self._epoch(epoch)[offset : offset + count]
            found.append(part)
            position += part.numel()
            count -= part.numel()
        return torch.cat(found)


@dataclass(frozen=True)
class Batch:
    """int64 [B, S] tokens and, one byte further, the targets; on the device of the run."""

    tokens: Tensor
    targets: Tensor


class Loader:
    """Cuts batches out of a stream. The stream lies on the device unless it is very large."""

    def __init__(self, corpus: Corpus, config: Config, ranks: Ranks | None = None):
        self.config, self.ranks = config, ranks or Ranks()
        self.device = torch.device(config.device)
        self.order = DataOrder(corpus.train.numel(), config.seq_len, config.seed)
        self.train = self._place(corpus.train)
        self.valid = self._place(corpus.valid)

    def _place(self, stream: Tensor) -> Tensor:
        return stream if stream.numel() > RESIDENT_BYTES else stream.to(self.device)

    def _cut(self, stream: Tensor, starts: Tensor) -> Batch:
        if self.device.type == "cuda":
            starts = starts.pin_memory() if stream.is_cuda else starts
            starts = starts.to(stream.device, non_blocking=True)
        window = torch.arange(self.config.seq_len + 1, device=stream.device)
        cut = stream[starts[:, None] + window]
        if cut.device.type != self.device.type:
            cut = cut.pin_memory().to(self.device, non_blocking=True)
        ids = cut.long()
        return Batch(ids[:, :-1], ids[:, 1:].contiguous())

    def step(self, step: int) -> list[Batch]:
        """This rank's part of the micro-batches of optimizer step ``step``, counted from 0."""
        starts = self.order.starts(
            step * self.config.sequences_per_step, self.config.sequences_per_step
        )
        batches = starts.split(self.config.batch_size)
        return [self._cut(self.train, self.ranks.part(batch)) for batch in batches]

    def validation(self) -> Iterator[Batch]:
        """The same windows each time and on every rank, spread evenly over the held-out stream."""
        length = self.config.seq_len
        available = (self.valid.numel() - 1) // length
        wanted = min(self.config.eval_batches * self.config.batch_size, available)
        index = torch.arange(wanted) * available // wanted
        for part in (index * length).split(self.config.batch_size):
            yield self._cut(self.valid, part)


def nats_to_bits(nats: float) -> float:
    return nats / math.log(2)
