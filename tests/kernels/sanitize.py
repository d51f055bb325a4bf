"""The kernels of a layer and every tile of the GEMM, on small odd shapes, for compute-sanitizer.

It slows kernels a hundredfold:

    check="compute-sanitizer --report-api-errors no --error-exitcode 9"
    $check --tool memcheck python tests/kernels/sanitize.py
    $check --tool racecheck python tests/kernels/sanitize.py

(The driver is asked for entry points that it may lack, which are errors of its API.)

Results are checked elsewhere; here the tool looks at the accesses.
"""

from __future__ import annotations

import torch

import fp8moe
from fp8moe import quant
from fp8moe.functional.exchange import Layout
from fp8moe.kernels import dispatch, gemm, heuristics, message, permute
from fp8moe.kernels.fp8tensor import FP8Tensor, padded_capacity
from fp8moe.kernels.heuristics import Grouping, Output, Problem

SIZES = ([70, 0, 1, 130], [72, 0, 4, 132])
"""Rows of the groups: scales are copied 4 bytes at a time, and 16."""


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def forward_gemms(group_sizes: list[int], n: int = 264, k: int = 400) -> int:
    """Dense, grouped and masked with every tile; the number of launches."""
    groups, m = len(group_sizes), sum(group_sizes)
    a = quant.per_token(_random(m, k), pow2=True)
    b = quant.per_block(_random(groups, n, k), pow2=True)
    sizes = torch.tensor(group_sizes, device="cuda", dtype=torch.int32)
    ends = sizes.cumsum(0).int()
    each = max(group_sizes)
    masked = quant.per_token(_random(groups * each, k), pow2=True)
    masked_a, masked_scale = (
        masked.data.view(groups, each, k),
        masked.scale.unflatten(0, (groups, each)),
    )
    launches = 0
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    for tile in heuristics.candidates(Grouping.DENSE):
        p = Problem(Grouping.DENSE, Output.BF16, m, n, k)
        gemm._launch(p, *a, b.data[0], b.scale[0], None, out, (tile, 2))
        launches += 1
    for tile in heuristics.candidates(Grouping.M_GROUPED):
        p = Problem(Grouping.M_GROUPED, Output.BF16, m, n, k, groups)
        gemm._launch(p, *a, *b, ends, out, (tile, 2))
        p = Problem(Grouping.MASKED, Output.BF16, each, n, k, groups)
        masked_out = torch.empty(groups, each, n, device="cuda", dtype=torch.bfloat16)
        gemm._launch(p, masked_a, masked_scale, *b, sizes, masked_out, (tile, 2))
        launches += 2
    return launches


def weight_gradients(group_sizes: list[int], n: int = 136, k: int = 264) -> int:
    """Every tile and output; the number of launches."""
    ends = torch.tensor(group_sizes, device="cuda").cumsum(0).int()
    a = quant.per_channel(_random(sum(group_sizes), n), ends, pow2=True)
    b = quant.per_channel(_random(sum(group_sizes), k), ends, pow2=True, block=True)
    rows = padded_capacity(sum(group_sizes), len(group_sizes))
    launches = 0
    for tile in heuristics.candidates(Grouping.K_GROUPED):
        for output in Output:
            dtype = torch.bfloat16 if output == Output.BF16 else torch.float32
            out = torch.zeros(len(group_sizes), n, k, device="cuda", dtype=dtype)
            p = Problem(Grouping.K_GROUPED, output, n, k, rows, len(group_sizes))
            gemm._launch(p, *a, *b, ends, out, (tile, 2))
            launches += 1
    return launches


def layers() -> None:
    """Forward and backward with each way of saving, both scales, one and ten experts a token."""
    for save in ("fp8", "bf16", "recompute"):
        for pow2, topk, experts in ((True, 2, 4), (False, 10, 12)):
            x = _random(77, 256).requires_grad_()
            ids = torch.randint(experts, (77, topk), device="cuda", dtype=torch.int32)
            p = torch.rand(77, topk, device="cuda").requires_grad_()
            w13 = _random(experts, 256, 256).requires_grad_()
            w2 = _random(experts, 256, 128).requires_grad_()
            config = fp8moe.FP8Config(save=save, pow2_scales=pow2, pow2_weight_scales=pow2)
            y = fp8moe.swiglu_experts(x, ids, p, w13, w2, config=config)
            y.backward(torch.randn_like(y))


def messages() -> None:
    """What a dispatch over ranks runs, from the maps to rows that are read where they arrived."""
    for dtype, topk, ranks in ((torch.int64, 3, 4), (torch.int32, 10, 2)):
        ids = torch.randint(0, 13, (77, topk), device="cuda", dtype=dtype)
        weights = torch.rand(77, topk, device="cuda")
        _, first_row, _, slot_of_row, _ = dispatch.dispatch_maps(ids, 12, ranks, [1])
        layout = Layout(256, True, topk)
        rows = torch.empty(len(slot_of_row), layout.row_bytes, dtype=torch.uint8, device="cuda")
        data, scale, routing = layout.parts(rows)
        message.cast_permute_into(_random(77, 256), first_row, slot_of_row, True, data, scale)
        dispatch.dispatch_routing(ids, weights, first_row, 12 // ranks, routing)
        received = int((slot_of_row >= 0).sum())
        local = routing[:received, topk:].contiguous()
        kept = int((local < 12 // ranks).sum())
        row_of_slot, slots, *_ = permute.route_kept(local, 12 // ranks, kept)
        permute.permute_fp8(data[:received], scale[:received], row_of_slot, slots)
        permute.permute_fp8_both(data[:received], scale[:received], slots, topk, True)


def main() -> None:
    torch.manual_seed(0)
    launches = sum(forward_gemms(sizes) + weight_gradients(sizes) for sizes in SIZES)
    launches += weight_gradients(SIZES[0], 130)  # any number of channels: 4 bytes
    layers()
    messages()
    x = quant.per_token(_random(33, 144), pow2=False)
    w = quant.per_block(_random(136, 144), pow2=False)
    gemm.gemm_nt(FP8Tensor(*x), FP8Tensor(*w))
    torch.cuda.synchronize()
    fp8moe.check_errors()
    print(f"{launches} GEMMs and 6 layers ran")


if __name__ == "__main__":
    main()
