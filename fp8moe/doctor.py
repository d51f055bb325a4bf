"""What this machine can do with fp8moe, and why not: the facts behind ``fp8moe doctor``.

Facts are gathered in an order that cannot hang: nothing asks CUDA about GPUs before the driver has
answered ``cuInit``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from typing import Any

import fp8moe

_TINY_KERNEL = """extern "C" __global__ void tiny(float* x) { x[threadIdx.x] = 1.0f; }\n"""
_OPTIONAL = ("transformers", "deepspeed", "einops", "tensorboard", "safetensors")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _driver() -> dict[str, Any]:
    from fp8moe.kernels import driver

    try:
        return {"ok": True, "version": driver.driver_version(), "reason": None}
    except driver.DriverError as error:
        return {"ok": False, "version": None, "reason": _first_line(error)}


def _gpus(driver: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """(GPUs, why there are none)."""
    import torch

    if not driver["ok"]:
        return [], driver["reason"]
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return [], f"torch {torch.__version__} finds no GPU it can use with this driver"
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "multiprocessors": p.multi_processor_count,
            }
        )
    return found, None if found else "no GPU is visible (CUDA_VISIBLE_DEVICES?)"


def _compiler() -> dict[str, Any]:
    """NVRTC, tried on a kernel of one line; the disk cache is not asked."""
    from fp8moe.kernels import jit

    report: dict[str, Any] = {"ok": False, "version": None, "path": None, "reason": None}
    try:
        report["version"], report["path"] = jit.compiler()
        start = time.perf_counter()
        cubin, log = jit._nvrtc(_TINY_KERNEL, "doctor.cu", jit.OPTIONS)
        report["compile_ms"] = round((time.perf_counter() - start) * 1e3, 1)
        report["ok"] = cubin is not None
        report["reason"] = None if cubin else f"a one-line kernel does not compile: {log.strip()}"
    except RuntimeError as error:
        report["reason"] = _first_line(error)
    return report


def _cache() -> dict[str, Any]:
    from fp8moe.kernels import disk_cache

    directory = disk_cache.directory()
    kernels, size = disk_cache.usage()
    report: dict[str, Any] = {
        "path": str(directory),
        "kernels": kernels,
        "bytes": size,
        "limit_bytes": None,
        "writable": True,
        "reason": None,
    }
    try:
        report["limit_bytes"] = disk_cache.limit_bytes()
        disk_cache.check_writable()
    except (OSError, ValueError) as error:
        report["writable"] = not isinstance(error, OSError)
        report["reason"] = _first_line(error)
    return report


def _backends(gpus: list[dict[str, Any]], compiler: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from fp8moe.kernels import registry

    found = []
    for name in ("cpu", *(f"cuda:{gpu['index']}" for gpu in gpus)):
        entry: dict[str, Any] = {"device": name, "backend": None, "reason": None}
        try:
            entry["backend"] = registry.backend(torch.device(name))
        except (RuntimeError, ValueError) as error:
            entry["reason"] = str(error)
        if entry["backend"] == "cuda" and not compiler["ok"]:
            entry["backend"], entry["reason"] = None, compiler["reason"]
        found.append(entry)
    return found


def examine() -> dict[str, Any]:
    """Everything ``fp8moe doctor --json`` prints; ``usable`` says whether any backend works."""
    report: dict[str, Any] = {
        "fp8moe": fp8moe.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "usable": False,
    }
    try:
        import torch
    except ImportError as error:
        report["torch"] = None
        report["verdict"] = f"Nothing works without torch: {error}. Install torch>=2.11."
        return report
    report["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda}
    report["cuda_bindings"] = _version("cuda-bindings")
    report["driver"] = _driver()
    report["gpus"], report["no_gpu_reason"] = _gpus(report["driver"])
    report["nvrtc"] = _compiler()
    report["cache"] = _cache()
    report["requested_backend"] = os.environ.get("FP8MOE_BACKEND", "auto")
    report["backends"] = _backends(report["gpus"], report["nvrtc"])
    report["packages"] = {name: _version(name) for name in _OPTIONAL}
    report["usable"] = any(entry["backend"] for entry in report["backends"])
    report["verdict"] = _verdict(report)
    return report


def _verdict(report: dict[str, Any]) -> str:
    backends = report["backends"]
    fast = [entry["device"] for entry in backends if entry["backend"] == "cuda"]
    slow = [entry["device"] for entry in backends if entry["backend"] == "reference"]
    if fast:
        return f"FP8 kernels run on {', '.join(fast)}."
    reasons = [entry["reason"] for entry in backends if entry["reason"]]
    why = reasons[0] if reasons else report["no_gpu_reason"]
    if slow and report["requested_backend"] == "reference":
        why = "FP8MOE_BACKEND=reference is set"
    if slow:
        return f"The PyTorch reference (slow) runs on {', '.join(slow)}. No FP8 kernels: {why}"
    return f"Nothing is usable: {why}"


def describe(report: dict[str, Any]) -> str:
    """The report as one screen of text."""
    lines = [
        ("fp8moe", report["fp8moe"]),
        ("python", f"{report['python']}, {report['cpu_cores']} cores, {report['platform']}"),
    ]
    if report["torch"] is None:
        lines.append(("torch", "missing"))
    else:
        lines += _describe_machine(report)
    lines.append(("verdict", report["verdict"]))
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _describe_machine(report: dict[str, Any]) -> list[tuple[str, str]]:
    torch, driver, nvrtc, cache = (report[k] for k in ("torch", "driver", "nvrtc", "cache"))
    cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
    bindings = report["cuda_bindings"] or "missing (pip install 'cuda-python>=13')"
    lines = [
        ("torch", f"{torch['version']} ({cuda})"),
        ("bindings", f"cuda-bindings {bindings}"),
        ("driver", f"CUDA {driver['version']}" if driver["ok"] else f"none: {driver['reason']}"),
    ]
    for gpu in report["gpus"]:
        lines.append(
            (
                f"cuda:{gpu['index']}",
                f"{gpu['name']}, compute capability {gpu['capability']}, "
                f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']} GiB",
            )
        )
    if not report["gpus"] and driver["ok"]:
        lines.append(("gpu", f"none: {report['no_gpu_reason']}"))
    if nvrtc["ok"]:
        lines.append(
            ("nvrtc", f"{nvrtc['version']}, compiles for sm_90a in {nvrtc['compile_ms']} ms")
        )
        lines.append(("", nvrtc["path"]))
    else:
        lines.append(("nvrtc", f"unusable: {nvrtc['reason']}"))
    mib = f"{cache['bytes'] / 2**20:.1f}"
    limit = f" of {cache['limit_bytes'] / 2**20:.0f}" if cache["limit_bytes"] else ""
    trouble = f"; NOT WRITABLE: {cache['reason']}" if not cache["writable"] else ""
    if cache["writable"] and cache["reason"]:
        trouble = f"; {cache['reason']}"
    lines.append(
        ("cache", f"{cache['path']}: {cache['kernels']} kernels, {mib}{limit} MiB{trouble}")
    )
    for entry in report["backends"]:
        chosen = entry["backend"] or f"none: {entry['reason']}"
        lines.append(("backend", f"{entry['device']}: {chosen}"))
    packages = (f"{name} {version or '-'}" for name, version in report["packages"].items())
    lines.append(("optional", ", ".join(packages)))
    return lines
