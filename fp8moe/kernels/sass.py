"""Issue hints of the promotion's FFMAs, rewritten in the compiled kernel.

An FFMA reads three registers through two banks of one read a cycle. ``.reuse`` keeps an operand for
the next instruction, which then reads one register less; the yield hint lets the scheduler turn to
the other warp, after which the operand is gone. ptxas alternates the two, so every second FFMA of
the promotion reads its scale again. Here a run of neighbours with the same operand keeps it ``RUN``
times before it yields once.

Measured on an H100 (4096 x 4096 x 7168, runs of 2, 3, 4, 6, 8, 16, unlimited): 172.6, 170.9, 168.4,
166.6, 166.1, 166.1, 177 us; every other pairing of the two hints is slower than ptxas's. Only hints
change: the instructions, their order and so the results stay the same.

Source: the control fields of Volta to Hopper instructions as published by reverse engineering (Jia
et al., arXiv 1804.06826), checked against nvdisasm by the tests; the idea is DeepGEMM's, which
flipped the same two bits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

RUN = 8

_FFMA = 0x223  # FFMA R, R, R, R: bits 0 to 11
_ALWAYS = 7  # predicate PT: bits 12 to 15
_NO_YIELD = 1 << 45  # in the upper word
_REUSE_B = 1 << 59
_REUSE = 0xF << 58  # of any operand


def _code(cubin: bytes) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of every section of instructions of a 64-bit little-endian ELF file."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"cubin: expected a 64-bit little-endian ELF file, got {cubin[:6]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry) for i in range(count)]
    for name, _, _, _, offset, size, *_ in sections:
        if cubin[sections[names][4] + name :].startswith(b".text."):
            yield offset, size


def _held(low: int) -> int | None:
    """The register in operand B of an unconditional FFMA of registers, else None."""
    if low & 0xFFF != _FFMA or low >> 12 & 0xF != _ALWAYS:
        return None
    destination, b = low >> 16 & 0xFF, low >> 32 & 0xFF
    return None if destination == b else b


def hold_operands(cubin: bytes, run: int = RUN) -> bytes:
    """``cubin`` with operand B of neighbouring FFMAs held ``run`` - 1 times in a row, then yielded.

    Raises: ValueError when it is no 64-bit little-endian ELF file.
    """
    patched = bytearray(cubin)
    for start, size in _code(cubin):
        held_before = 0
        for at in range(start, start + size, 16):
            low, high = struct.unpack_from("<QQ", cubin, at)
            b = _held(low)
            following = struct.unpack_from("<Q", cubin, at + 16)[0] if at + 16 < start + size else 0
            if b is None:
                held_before = 0
                continue
            if _held(following) == b and held_before < run - 1:
                high |= _REUSE_B | _NO_YIELD
                held_before += 1
            else:
                high &= ~_REUSE_B
                held_before = 0
                if not high & _REUSE:  # a yield would lose what ptxas holds of another operand
                    high &= ~_NO_YIELD
            struct.pack_into("<Q", patched, at + 8, high)
    return bytes(patched)
