"""The text of a run: which files, which bytes, in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import pytest
import torch

from recipes.pretrain.config import Config, UserError
from recipes.pretrain.data import FILE_END, DataOrder, Loader, load_corpus, unigram_entropy

TINY = Config(seq_len=16, batch_size=2, valid_fraction=0.2, eval_batches=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty text files in two folders, some of them not to be read."""
    root = tmp_path / "text"
    for i in range(20):
        file = root / ("a" if i % 2 else "b") / f"{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([65 + i]) * (100 + i))
    (root / "notes.txt").write_text("not python")
    (root / ".hidden.py").write_text("hidden")
    return root


def _config(path: Path, **changes: object) -> Config:
    return dataclasses.replace(TINY, data=str(path), **changes)


def test_hash_and_counts_are_those_of_the_sorted_files(folder: Path) -> None:
    corpus = load_corpus(_config(folder, pattern="*.py"))
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("[ab]/*.py"))
    joined = b"".join((folder / name).read_bytes() for name in names)
    assert corpus.sha256 == hashlib.sha256(joined).hexdigest()
    assert corpus.num_files == 20
    assert corpus.num_bytes == len(joined)
    assert corpus.train.numel() + corpus.valid.numel() == len(joined) + 20  # an end per file


def test_hash_sees_one_changed_byte(folder: Path) -> None:
    before = load_corpus(_config(folder)).sha256
    (folder / "a" / "1.py").write_bytes(b"X" * 101)
    assert load_corpus(_config(folder)).sha256 != before


def test_split_is_by_file(folder: Path) -> None:
    corpus = load_corpus(_config(folder, pattern="*.py"))
    train, valid = set(corpus.train.tolist()), set(corpus.valid.tolist())
    assert train & valid == {FILE_END}
    assert len(train | valid) == 21
    assert 0 < corpus.valid.numel() <= 0.2 * corpus.num_bytes + 20


def test_pattern_default_reads_every_visible_file(folder: Path) -> None:
    assert load_corpus(_config(folder)).num_files == 21


def test_single_file_is_split_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(1, 201)) * 5)
    corpus = load_corpus(_config(file))
    assert torch.cat([corpus.train, corpus.valid])[:-1].tolist() == list(file.read_bytes())
    assert corpus.valid.numel() == pytest.approx(200, abs=2)


def test_default_text_is_torch() -> None:
    corpus = load_corpus(dataclasses.replace(TINY, valid_fraction=0.02))
    assert corpus.source == f"torch {torch.__version__}"
    assert corpus.num_files > 1000
    assert 2.5 < corpus.entropy < 4.0


def test_entropy() -> None:
    assert unigram_entropy(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)) == pytest.approx(
        math.log(4)
    )
    assert unigram_entropy(torch.full((9,), 7, dtype=torch.uint8)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing", "--data: no such file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "--data: no file in .* matches"),
        (lambda p: (p / "s.txt").write_text("short") and p / "s.txt", "too little text for train"),
        (lambda p: (p / "s.txt").write_text("m" * 60) and p / "s.txt", "too little text for valid"),
    ],
)
def test_bad_data(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(_config(make(tmp_path)))


def test_an_epoch_reads_each_window_once_and_the_next_differs() -> None:
    order = DataOrder(num_bytes=1000, seq_len=10, seed=3)
    first = order.starts(0, order.windows)
    second = order.starts(order.windows, order.windows)
    for starts in (first, second):
        assert starts.unique().numel() == order.windows
        assert len({int(s) % 10 for s in starts}) == 1
        assert int(starts.min()) >= 0 and int(starts.max()) + 10 < 1000
    assert not torch.equal(first, second)


@pytest.mark.parametrize("position", [0, 37, 98, 99, 250])
def test_order_depends_on_seed_and_position_only(position: int) -> None:
    walked = DataOrder(1000, 10, seed=3)
    steps = torch.cat([walked.starts(i * 7, 7) for i in range(60)])
    jumped = DataOrder(1000, 10, seed=3).starts(position, 25)
    assert torch.equal(jumped, steps[position : position + 25])
    assert not torch.equal(jumped, DataOrder(1000, 10, seed=4).starts(position, 25))


def test_batches_are_windows_and_targets_one_byte_on(folder: Path, device: torch.device) -> None:
    config = _config(folder, grad_accumulation=3, device=device.type)
    corpus = load_corpus(config)
    batches = Loader(corpus, config).step(5)
    assert len(batches) == 3
    starts = DataOrder(corpus.train.numel(), 16, config.seed).starts(5 * 6, 6)
    for i, start in enumerate(starts.tolist()):
        batch = batches[i // 2]
        window = corpus.train[start : start + 17].long()
        assert batch.tokens.device.type == device.type
        assert torch.equal(batch.tokens[i % 2].cpu(), window[:-1])
        assert torch.equal(batch.targets[i % 2].cpu(), window[1:])


def test_validation_is_the_same_each_time_and_never_training_text(folder: Path) -> None:
    config = _config(folder, pattern="*.py")
    corpus = load_corpus(config)
    loader = Loader(corpus, config)
    first, second = list(loader.validation()), list(loader.validation())
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.tokens, b.tokens)
    seen = {v for batch in first for v in batch.tokens.unique().tolist()}
    assert seen <= set(corpus.valid.tolist())
