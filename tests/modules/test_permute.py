"""permute and unpermute: against indexing, gradients, layout, determinism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8moe import testing
from fp8moe.config import FP8Config
from fp8moe.functional import grouped_linear
from fp8moe.modules import permutation, permute, unpermute

T, H, E, K = 70, 64, 5, 3


def routed(device, **options):
    ids, weights = testing.random_topk(T, K, E, 0, device=device, **options)
    return permutation(ids, E), ids, weights


def tokens(device):
    return torch.randn(T, H, device=device).bfloat16()


@given(
    tokens=st.integers(0, 300),
    topk=st.integers(1, 4),
    experts=st.integers(4, 12),
    seed=st.integers(0, 99),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_layout(tokens, topk, experts, seed, dropped):
    ids, _ = testing.random_topk(tokens, topk, experts, seed, dropped=dropped)
    p = permutation(ids, experts)
    ends = p.group_ends.tolist()
    assert all(end % 128 == 0 for end in ends) and ends == sorted(ends)
    assert ends[-1] <= len(p.slot_of_row)
    for e in range(experts):
        start = ends[e - 1] if e else 0
        slots = (ids.flatten() == e).nonzero().flatten().tolist()
        rows = p.slot_of_row[start : ends[e]].tolist()
        assert rows == slots + [-1] * (len(rows) - len(slots))  # slot order, then padding
        assert ends[e] - start - len(slots) < 128
        assert int(p.num_tokens_per_expert[e]) == len(slots)
    assert (p.slot_of_row[ends[-1] :] == -2).all()
    assert torch.equal(p.row_of_slot == -1, ids == experts)


def test_permute_copies_rows_and_zeroes_padding(device):
    p, ids, _ = routed(device, dropped=0.2)
    x = tokens(device)
    rows = permute(x, p)
    end = int(p.group_ends[-1])
    for slot, row in zip(p.slot_of_row[:end].tolist(), rows, strict=False):
        assert torch.equal(row, x[slot // K]) if slot >= 0 else not row.any()
    assert rows.shape == (len(p.slot_of_row), H)


def test_unpermute_sums_in_fp32(device):
    p, ids, _ = routed(device, dropped=0.2)
    y = torch.randn(len(p.slot_of_row), H, device=device).bfloat16()
    out = unpermute(y, p)
    rows = p.row_of_slot.long()
    terms = y[rows.clamp_min(0)].float().masked_fill((rows < 0)[..., None], 0)
    expected = ((terms[:, 0] + terms[:, 1]) + terms[:, 2]).bfloat16()
    assert torch.equal(out, expected)


def test_there_and_back_is_times_the_number_of_kept_slots(device):
    p, ids, _ = routed(device, dropped=0.2)
    x = tokens(device)
    kept = (ids < E).sum(1, keepdim=True)
    assert torch.equal(unpermute(permute(x, p), p), (x.float() * kept).bfloat16())


def test_gradients_are_each_others_adjoint(device):
    p, _, _ = routed(device, dropped=0.2)
    x = tokens(device).requires_grad_()
    rows = permute(x, p)
    end = int(p.group_ends[-1])
    upstream = torch.randn_like(rows)
    upstream[end:] = float("nan")  # nothing past the last group is read
    (dx,) = torch.autograd.grad(rows, x, upstream)
    assert torch.equal(dx, unpermute(upstream, p))

    y = rows.detach().requires_grad_()
    dy = tokens(device)
    (drows,) = torch.autograd.grad(unpermute(y, p), y, dy)
    assert torch.equal(drows[:end], permute(dy, p)[:end])


def test_composes_with_grouped_linear(device):
    """A linear expert layer by hand: the building blocks fit together."""
    p, ids, weights = routed(device)
    x = tokens(device).requires_grad_()
    w = torch.randn(E, 48, H, device=device, requires_grad=True)
    y = unpermute(grouped_linear(permute(x, p), w, p.group_ends, config=FP8Config.bf16()), p)
    exact = torch.einsum("th,tknh->tn", x.double(), w.double()[ids])
    assert testing.sqnr_db(y.detach(), exact.detach()) > 40
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, w), dy)
    references = torch.autograd.grad(exact, (x, w), dy.double())
    for a, b in zip(grads, references, strict=True):
        assert testing.sqnr_db(a, b) > 40


def test_differentiating_twice_is_refused(device):
    p, _, _ = routed(device)
    x = tokens(device).requires_grad_()
    rows = permute(x, p)
    (dx,) = torch.autograd.grad(rows, x, rows.detach().clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


def test_no_tokens(device):
    p = permutation(torch.zeros(0, K, dtype=torch.int64, device=device), E)
    x = torch.randn(0, H, device=device).bfloat16().requires_grad_()
    y = unpermute(permute(x, p), p)
    assert y.shape == (0, H)
    y.sum().backward()
    assert x.grad.shape == (0, H)


def test_repeats_bit_for_bit(device):
    p, ids, _ = routed(device)
    again = permutation(ids, E)
    assert all(torch.equal(a, b) for a, b in zip(p, again, strict=True))


def test_bad_input_is_named(device):
    p, ids, _ = routed(device)
    x = tokens(device)
    with pytest.raises(ValueError, match=r"x_TH: expected \(70, H\) .*, got \(69, 64\)"):
        permute(x[1:], p)
    with pytest.raises(ValueError, match=r"y_RH: expected \(\d+, H\) .*, got \(70, 64\)"):
        unpermute(x, p)
    with pytest.raises(ValueError, match="x: expected torch.bfloat16.*, got torch.float32"):
        permute(x.float(), p)
    with pytest.raises(ValueError, match="topk_ids: expected torch.int32 or torch.int64"):
        permutation(ids.float(), E)
