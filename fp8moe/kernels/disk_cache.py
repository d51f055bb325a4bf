"""The bounded directory of compiled kernels, shared by any number of processes.

An entry is one file that is written under a unique temporary name and renamed, so a reader sees a
whole file or none. A digest in front of the content catches files damaged later. When the directory
outgrows its limit, the least recently used entries go.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
from pathlib import Path

_MAGIC = b"fp8moe cache 1\n"
_SUFFIX = ".kernel"
_OUR_SUFFIXES = (_SUFFIX, ".cu", ".tmp")  # entries, sources of failed kernels, files being written
_ABANDONED_AFTER_S = 3600.0


def directory() -> Path:
    """``FP8MOE_CACHE_DIR``, else ``~/.cache/fp8moe``."""
    configured = os.environ.get("FP8MOE_CACHE_DIR")
    return Path(configured) if configured else Path(os.path.expanduser("~/.cache/fp8moe"))


def limit_bytes() -> int:
    """The size the directory is kept under: ``FP8MOE_CACHE_MB`` (default 512) in bytes.

    Raises: ValueError unless ``FP8MOE_CACHE_MB`` is a number above zero.
    """
    text = os.environ.get("FP8MOE_CACHE_MB") or "512"
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0.0 < megabytes < float("inf"):
        raise ValueError(f"FP8MOE_CACHE_MB: expected a number above 0, got {text!r}")
    return int(megabytes * 2**20)


def path(name: str) -> Path:
    """The file of the entry ``name``."""
    return directory() / f"{name}{_SUFFIX}"


def read(name: str) -> bytes | None:
    """The content of the entry ``name``; None when it is missing, damaged or unreadable."""
    file = path(name)
    try:
        data = file.read_bytes()
    except OSError:
        return None
    digest_end = len(_MAGIC) + 64
    content = data[digest_end:]
    if not data.startswith(_MAGIC) or data[len(_MAGIC) : digest_end] != _digest(content):
        return None
    try:
        os.utime(file)  # the order of eviction is by last use
    except OSError:
        pass  # a cache that others own and we may only read still serves hits
    return content


def write(name: str, content: bytes) -> None:
    """Store an entry, then evict old ones; a directory that cannot be written is a warning."""
    file = path(name)
    limit = limit_bytes()
    try:
        write_atomically(file, _MAGIC + _digest(content) + content)
    except OSError as error:
        warnings.warn(
            f"the kernel cache {file.parent} cannot be written ({error.strerror or error}): each "
            f"process compiles its kernels anew; set FP8MOE_CACHE_DIR to a writable directory",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    _evict(limit, keep=file)


def write_atomically(file: Path, data: bytes) -> None:
    """Write ``file`` so that any other process sees all of it or none of it.

    Raises: OSError when it cannot be written; nothing is left behind then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, so that the rename does not cross file systems; under a unique name, so
    # that many processes can write the same entry at once.
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable() -> None:
    """Raise OSError unless entries can be stored in the directory; leaves no file behind."""
    probe = directory() / f"probe-{os.getpid()}.tmp"
    write_atomically(probe, b"")
    probe.unlink()


def usage() -> tuple[int, int]:
    """(entries, bytes of all our files) in the directory."""
    files = _files()
    entries = sum(1 for _, _, file in files if file.suffix == _SUFFIX)
    return entries, sum(size for _, size, _ in files)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _files() -> list[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of our files; another process may delete any meanwhile."""
    found = []
    try:
        files = list(directory().iterdir())
    except OSError:
        return []
    for file in files:
        if file.suffix in _OUR_SUFFIXES:
            try:
                stat = file.stat()
            except OSError:
                continue
            found.append((stat.st_mtime, stat.st_size, file))
    return found


def _evict(limit: int, keep: Path) -> None:
    files = sorted(_files())
    total = sum(size for _, size, _ in files)
    now = time.time()
    for last_use, size, file in files:
        if file.suffix == ".tmp":
            delete = now - last_use > _ABANDONED_AFTER_S  # its writer was killed
        else:
            delete = total > limit and file != keep
        if delete:
            try:
                file.unlink(missing_ok=True)
            except OSError:
                continue
            total -= size
