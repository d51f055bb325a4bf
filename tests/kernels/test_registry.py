"""Operator registration, the choice of backend, and device-side status messages."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fp8moe.kernels import registry, status

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _plain_environment(environment: Any) -> None:
    environment("FP8MOE_BACKEND", None)
    environment("FP8MOE_DEBUG", None)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(registry, "_gpu", lambda index: (name, capability))


# ------------------------------------------------------------------------------------------ backend


@pytest.mark.parametrize("value", ["auto", ""])
def test_cpu_runs_the_reference(environment: Any, value: str) -> None:
    assert registry.backend(CPU) == "reference"
    environment("FP8MOE_BACKEND", value)  # empty is as good as unset
    assert registry.backend(CPU) == "reference"


def test_hopper_runs_the_kernels(monkeypatch: pytest.MonkeyPatch, environment: Any) -> None:
    pretend_gpu(monkeypatch, "NVIDIA H100", (9, 0))
    assert registry.backend(CUDA) == "cuda"
    environment("FP8MOE_BACKEND", "cuda")
    assert registry.backend(CUDA) == "cuda"
    environment("FP8MOE_BACKEND", "reference")
    assert registry.backend(CUDA) == "reference"


@pytest.mark.parametrize(
    ("name", "capability"), [("NVIDIA A100", (8, 0)), ("NVIDIA B200", (10, 0)), ("L4", (8, 9))]
)
@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_other_gpu_is_named_with_what_would_work(
    monkeypatch: pytest.MonkeyPatch,
    environment: Any,
    name: str,
    capability: tuple[int, int],
    choice: str,
) -> None:
    pretend_gpu(monkeypatch, name, capability)
    environment("FP8MOE_BACKEND", choice)
    with pytest.raises(RuntimeError) as caught:
        registry.backend(CUDA)
    text = str(caught.value)
    for part in (name, f"{capability[0]}.{capability[1]}", "H100", "FP8MOE_BACKEND=reference"):
        assert part in text
    environment("FP8MOE_BACKEND", "reference")
    assert registry.backend(CUDA) == "reference"


def test_kernels_on_a_cpu_tensor_are_refused(environment: Any) -> None:
    environment("FP8MOE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="expected tensors on a Hopper GPU, got device cpu"):
        registry.backend(CPU)


def test_unknown_backend_is_refused(environment: Any) -> None:
    environment("FP8MOE_BACKEND", "triton")
    with pytest.raises(ValueError, match="expected auto, cuda or reference, got 'triton'"):
        registry.backend(CPU)


# ---------------------------------------------------------------------------------------- operators


@pytest.fixture(scope="module")
def ops() -> dict[str, Any]:
    def halves(x: torch.Tensor, up: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2 if up else x / 2, x.clone()

    def fill(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)

    def unused(*args: Any) -> None:
        raise AssertionError("the CUDA function ran for a CPU tensor")

    return {
        "halves": registry.define_op(
            "test_halves(Tensor x, bool up) -> (Tensor, Tensor)",
            cpu=halves,
            cuda=unused,
            fake=lambda x, up: (torch.empty_like(x), torch.empty_like(x)),
        ),
        "fill": registry.define_op(
            "test_fill(Tensor x, Tensor(a!) out) -> ()",
            cpu=fill,
            cuda=unused,
            fake=lambda x, out: None,
        ),
    }


def test_functional_op(ops: dict[str, Any]) -> None:
    x = torch.randn(3, 4)
    doubled, copied = ops["halves"](x, True)
    assert torch.equal(doubled, x * 2) and torch.equal(copied, x)
    assert torch.ops.fp8moe.test_halves.default is ops["halves"].op
    torch.library.opcheck(ops["halves"].op, (x, False))


def test_mutating_op(ops: dict[str, Any]) -> None:
    x, out = torch.randn(5), torch.zeros(5)
    assert ops["fill"](x, out) is None
    assert torch.equal(out, x)
    torch.library.opcheck(ops["fill"].op, (x, out))


def test_the_short_way_to_the_cuda_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken where nothing watches."""
    calls: list[str] = []
    op = registry.define_op(
        "test_short(Tensor x, Tensor(a!) out) -> ()",
        cpu=lambda x, out: calls.append("dispatched"),
        cuda=lambda x, out: calls.append("direct"),
        fake=lambda x, out: None,
    )
    monkeypatch.setattr(registry, "backend", lambda device: "cuda")
    x, out = torch.ones(2), torch.zeros(2)
    op(x, out)
    assert calls == ["dispatched"]  # a CPU tensor
    monkeypatch.setattr(registry, "_observed", lambda args: False)
    op(x, out)
    assert calls == ["dispatched", "direct"]


@pytest.mark.gpu
def test_what_watches_a_call() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, device="cuda")
    weight = torch.nn.Parameter(x)
    assert not registry._observed((x, None, 3))
    assert registry._observed((x, weight)) and registry._observed((x.cpu(),))
    with torch.no_grad():
        assert not registry._observed((x, weight)) and not registry._observed((weight, 3))
    with Nothing():
        assert registry._observed((x,))
    with torch.profiler.profile():
        assert registry._observed((x,))


def test_a_tensor_that_overloads_operators_is_noticed_wherever_it_is() -> None:
    class Wrapped(torch.Tensor):
        pass

    x = torch.ones(2)
    weight, wrapped = torch.nn.Parameter(x), x.as_subclass(Wrapped)
    for plain in ((x, 3, None), (weight, x), (x, weight, 2.0)):
        assert registry._plain(tuple(map(type, plain)))
    for other in ((wrapped, x), (x, wrapped), (x, None, wrapped), (None, x)):
        assert not registry._plain(tuple(map(type, other)))


def test_compiles_into_one_graph_and_sees_strides(ops: dict[str, Any]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return ops["halves"](x.t().contiguous().t(), True)[0] + 1

    x = torch.randn(4, 8)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x * 2 + 1)


def test_op_meets_the_backend_choice(ops: dict[str, Any], environment: Any) -> None:
    environment("FP8MOE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="FP8MOE_BACKEND=cuda"):
        ops["halves"](torch.ones(2), True)


def cuda_entry(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> Any:
    """The CUDA entry of an operator, callable here with CPU tensors."""
    monkeypatch.setattr(registry, "_first_device", lambda args: CUDA)
    pretend_gpu(monkeypatch, "NVIDIA H100", (9, 0))
    return registry._on_cuda(
        "op", cpu=lambda x: calls.append("cpu"), cuda=lambda x: calls.append("cuda")
    )


def test_cuda_entry_dispatches(monkeypatch: pytest.MonkeyPatch, environment: Any) -> None:
    calls: list[str] = []
    entry = cuda_entry(monkeypatch, calls)
    entry(None)
    environment("FP8MOE_BACKEND", "reference")
    entry(None)
    assert calls == ["cuda", "cpu"]


# ------------------------------------------------------------------------------------------- status


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The status words of cuda:0, in ordinary memory."""
    buffer = status._Buffer(pin=False)
    monkeypatch.setattr(status, "_buffers", {0: buffer})
    address = status.pointer(CUDA).value
    assert address == buffer.tensor.data_ptr()
    yield (ctypes.c_int32 * 8).from_address(address)


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (1, ["group_ends", "group_ends[5] = 70 after 80"]),
        (2, ["group_ends", "at most 80", "group_ends[5] = 70"]),
        (3, ["topk_ids", "<= 80", "got 70 at flat index 5"]),
        (4, ["group_sizes", "<= 80", "group_sizes[5] = 70"]),
        (99, ["unknown status code 99", "index 5, value 70, limit 80"]),
    ],
)
def test_status_becomes_a_named_error_once(words: Any, code: int, parts: list[str]) -> None:
    status.check(CUDA)
    words[1], words[2], words[3], words[0] = 5, 70, 80, code
    with pytest.raises(ValueError) as caught:
        status.check(CUDA)
    for part in [*parts, "cuda:0", "earlier fp8moe operator"]:
        assert part in str(caught.value)
    status.check(CUDA)  # cleared
    assert list(words) == [0] * 8


def test_next_op_raises_before_it_launches(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    entry = cuda_entry(monkeypatch, calls)
    words[0] = 1
    with pytest.raises(ValueError, match="group_ends"):
        entry(None)
    assert calls == []
    entry(None)
    assert calls == ["cuda"]


def test_debug_mode_raises_at_the_op_itself(
    words: Any, monkeypatch: pytest.MonkeyPatch, environment: Any
) -> None:
    environment("FP8MOE_DEBUG", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def synchronize(device: torch.device) -> None:
        words[0] = 2

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(ValueError, match=r"found on cuda:0 by fp8moe::op\)"):
        cuda_entry(monkeypatch, [])(None)


def test_check_errors_is_public_and_quiet_without_a_gpu() -> None:
    import fp8moe

    fp8moe.check_errors()
