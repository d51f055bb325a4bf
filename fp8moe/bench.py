"""A short timing of the GEMMs and of one expert layer on this machine's Hopper GPU.

This answers "is this installation fast?" in half a minute. The full comparisons, with the flags to
choose shapes, are the scripts in ``benchmarks/``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp8moe.shapes import LayerShape


def missing() -> str | None:
    """Why this machine cannot run the timing; None when it can."""
    from fp8moe.kernels import driver, registry

    try:
        driver.driver()
    except driver.DriverError as error:
        found = str(error)
    else:
        if not torch.cuda.is_available():
            found = f"torch {torch.__version__} sees no GPU"
        else:
            name, capability = registry._gpu(torch.cuda.current_device())
            if capability == registry.HOPPER:
                return None
            found = f"{name} has compute capability {capability[0]}.{capability[1]}"
    return (
        "fp8moe bench: expected a Hopper GPU (compute capability 9.0: H100, H200, H20) with its "
        f"driver and a CUDA build of torch, got: {found}. `fp8moe doctor` shows what works here."
    )


def _ends(groups: int, rows: int) -> torch.Tensor:
    return torch.arange(1, groups + 1, dtype=torch.int32, device="cuda") * rows


def _gemms() -> list[tuple[str, float, Callable[[], object]]]:
    """(name, FLOPs, call) of the GEMMs of a DeepSeek-V3 slice, with cuBLAS beside the dense one."""
    from fp8moe import kernels, quant

    m, n, k, e = 4096, 4096, 7168, 8
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    a, b = quant.per_token(x, pow2=True), quant.per_block(w, pow2=True)
    one = torch.ones((), device="cuda")
    flops = 2.0 * m * n * k

    def cublas() -> torch.Tensor:
        return torch._scaled_mm(
            a.data, b.data.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    xs = torch.randn(e * m, k, device="cuda", dtype=torch.bfloat16)
    dys = torch.randn(e * m, n, device="cuda", dtype=torch.bfloat16)
    ends = _ends(e, m)
    xs8, ws8 = quant.per_token(xs, pow2=True), quant.per_block(w.repeat(e, 1, 1), pow2=True)
    dy_t = quant.per_channel(dys, ends, pow2=True)
    x_t = quant.per_channel(xs, ends, pow2=True, block=True)
    grad = torch.zeros(e, n, k, device="cuda")
    return [
        (f"cuBLAS FP8 tensorwise {m}x{n}x{k}", flops, cublas),
        (f"gemm_nt {m}x{n}x{k}", flops, lambda: kernels.gemm_nt(a, b)),
        (
            f"m_grouped_gemm_nt {e} x ({m}x{n}x{k})",
            e * flops,
            lambda: kernels.m_grouped_gemm_nt(xs8, ws8, ends),
        ),
        (
            f"k_grouped_gemm {e} x ({n}x{k}x{m}) into FP32",
            e * flops,
            lambda: kernels.k_grouped_gemm(dy_t, x_t, ends, out=grad),
        ),
    ]


def _layer(shape: LayerShape, tokens: int, fp8: bool) -> tuple[float, Callable[[], object]]:
    """(FLOPs, call) of forward and backward of one expert layer with uniform routing."""
    import fp8moe

    h, i, e, topk = shape.hidden, shape.intermediate, shape.experts, shape.topk
    device, dtype = torch.device("cuda"), torch.bfloat16
    config = fp8moe.FP8Config() if fp8 else fp8moe.FP8Config.bf16()
    x = torch.randn(tokens, h, device=device, dtype=dtype, requires_grad=True)
    w13 = (torch.randn(e, 2 * i, h, device=device, dtype=dtype) / h**0.5).requires_grad_()
    w2 = (torch.randn(e, h, i, device=device, dtype=dtype) / i**0.5).requires_grad_()
    scores = torch.randn(tokens, e, device=device).softmax(-1)
    weights, ids = scores.topk(topk, dim=-1)
    weights = weights.detach().requires_grad_()
    dy = torch.randn(tokens, h, device=device, dtype=dtype)

    def step() -> None:
        y = fp8moe.swiglu_experts(x, ids, weights, w13, w2, config=config)
        torch.autograd.grad(y, (x, weights, w13, w2), dy)

    return 18.0 * tokens * topk * h * i, step


def run(shape: LayerShape, tokens: int, emit: Callable[[str], None]) -> None:
    """Time the GEMMs and the layer, and emit one line of text for each as it is done."""
    from fp8moe.timing import time_kernel_us

    emit(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; median of 20, L2 flushed")
    for name, flops, call in _gemms():
        time_us = time_kernel_us(call)
        emit(f"{name:<52} {time_us:9.1f} us  {flops / time_us * 1e-6:7.0f} TFLOP/s")
    torch.cuda.empty_cache()
    label = (
        f"T{tokens} K{shape.topk} E{shape.experts} H{shape.hidden} I{shape.intermediate} fwd+bwd"
    )
    times = {}
    for fp8 in (False, True):
        flops, step = _layer(shape, tokens, fp8)
        name = "FP8" if fp8 else "BF16"
        times[name] = time_kernel_us(step, iters=10)
        emit(
            f"layer {name:<4} {label:<41} {times[name]:9.1f} us  "
            f"{flops / times[name] * 1e-6:7.0f} TFLOP/s"
        )
    emit(f"FP8 layer: {times['BF16'] / times['FP8']:.2f}x the BF16 one")
