"""Checks that are skipped for layouts which have passed them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8moe import kernels, quant
from fp8moe.kernels import operands
from fp8moe.kernels.fp8tensor import FP8Tensor


@pytest.fixture
def checked() -> tuple[Any, list[tuple[int, ...]]]:
    """A check of tensors whose last dimension must be even, and the shapes it has looked at."""
    seen: list[tuple[int, ...]] = []

    @operands.once_per_layout
    def check(x: torch.Tensor, out: torch.Tensor | None, *, flag: bool = False) -> None:
        seen.append(tuple(x.shape))
        if x.shape[-1] % 2 or flag:
            raise ValueError("odd")

    return check, seen


def test_a_layout_is_looked_at_once(checked: tuple[Any, list[tuple[int, ...]]]) -> None:
    check, seen = checked
    for _ in range(3):
        check(torch.empty(4, 2), None)
    assert seen == [(4, 2)]


@pytest.mark.parametrize(
    "other",
    [
        torch.empty(2, 2),
        torch.empty(2, 4).t(),
        torch.empty(4, 2, dtype=torch.float64),
        torch.empty(4, 2, device="meta"),
    ],
    ids=["shape", "strides", "dtype", "device"],
)
def test_another_layout_is_looked_at(
    checked: tuple[Any, list[tuple[int, ...]]], other: torch.Tensor
) -> None:
    check, seen = checked
    check(torch.empty(4, 2), None)
    check(other, None)
    check(torch.empty(4, 2), torch.empty(1))
    assert len(seen) == 3


def test_what_fails_fails_again(checked: tuple[Any, list[tuple[int, ...]]]) -> None:
    check, _ = checked
    check(torch.empty(4, 2), None)
    for _ in range(2):
        with pytest.raises(ValueError, match="odd"):
            check(torch.empty(4, 3), None)
        with pytest.raises(ValueError, match="odd"):
            check(torch.empty(4, 2), None, flag=True)


def test_layouts_do_not_pile_up(
    checked: tuple[Any, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check, seen = checked
    monkeypatch.setattr(operands, "_MAX_LAYOUTS", 2)
    for rows in (1, 2, 3, 3, 1):
        check(torch.empty(rows, 2), None)
    assert len(seen) == 4  # the third one made room, the first one is looked at again


def test_a_gemm_refuses_what_it_took_in_another_layout() -> None:
    a = quant.per_token(torch.randn(8, 256), pow2=True)
    b = quant.per_block(torch.randn(16, 256), pow2=True)
    kernels.gemm_nt(a, b)
    with pytest.raises(ValueError, match="a.scale: expected MN-major strides"):
        kernels.gemm_nt(FP8Tensor(a.data, a.scale.contiguous()), b)
    kernels.gemm_nt(a, b)


@pytest.mark.parametrize("moved", ["a", "b", "out"])
def test_an_address_is_looked_at_each_time(moved: str) -> None:
    def shifted(t: torch.Tensor) -> torch.Tensor:
        """The same layout eight bytes further on."""
        memory = torch.empty(t.nbytes + 8, dtype=torch.uint8)
        copy = memory[8:].view(t.dtype).view(t.shape)
        return copy.copy_(t)

    a = quant.per_token(torch.randn(8, 256), pow2=True)
    b = quant.per_block(torch.randn(16, 256), pow2=True)
    out = torch.empty(8, 16, dtype=torch.bfloat16)
    kernels.gemm_nt(a, b, out=out)
    a = FP8Tensor(shifted(a.data), a.scale) if moved == "a" else a
    b = FP8Tensor(shifted(b.data), b.scale) if moved == "b" else b
    out = shifted(out) if moved == "out" else out
    name = moved if moved == "out" else f"{moved}.data"
    with pytest.raises(ValueError, match=f"{name}: expected a 16-byte aligned address, got 0x"):
        kernels.gemm_nt(a, b, out=out)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_plain_tensor_is_refused_by_name(name: str) -> None:
    given = dict(
        a=quant.per_token(torch.randn(8, 256), pow2=True),
        b=quant.per_block(torch.randn(16, 256), pow2=True),
    )
    with pytest.raises(ValueError, match=f"{name}: expected an FP8Tensor, got Tensor"):
        kernels.gemm_nt(**{**given, name: given[name].data})
    with pytest.raises(ValueError, match="b_t: expected an FP8Tensor, got tuple"):
        kernels.k_grouped_gemm(given["a"], (1, 2), torch.zeros(1, dtype=torch.int32))


def test_symbolic_sizes_are_looked_at(checked: tuple[Any, list[tuple[int, ...]]]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    check, seen = checked

    def traced(x: torch.Tensor) -> torch.Tensor:
        check(x, None)
        return x + 1

    make_fx(traced, tracing_mode="symbolic")(torch.empty(4, 2))
    assert len(seen) == 1
