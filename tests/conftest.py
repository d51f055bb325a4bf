"""Fixtures and settings for all tests."""

from __future__ import annotations

import os

# Before torch: two test workers on two cores must not each start a thread per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:
    hypothesis = None


class _Absent(types.ModuleType):
    """Stands for hypothesis where it is missing: strategies are inert, ``given`` skips its test."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a module that is not from a file says so by lacking __file__
            raise AttributeError(name)
        return _Absent(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else _Absent("value")

    def composite(self, strategy: Callable[..., Any]) -> Any:
        return _Absent("strategy")

    def given(self, *args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
        def skipped(test: Callable[..., Any]) -> Any:
            @pytest.mark.skip(reason="needs hypothesis")
            def replacement(**fixtures: Any) -> None: ...

            # What is left after the strategies took theirs: fixtures and parametrized arguments.
            left = [p for p in inspect.signature(test).parameters.values() if p.name not in kwargs]
            left = left[: len(left) - len(args)]
            replacement.__name__ = test.__name__
            replacement.__signature__ = inspect.Signature(left)  # type: ignore[attr-defined]
            return replacement

        return skipped


if hypothesis is None:
    # A GPU machine that brings its own Python need not have hypothesis. Its property tests are
    # skipped there one by one; the other tests of the same files run.
    sys.modules["hypothesis"] = _Absent("hypothesis")
    sys.modules["hypothesis.strategies"] = _Absent("hypothesis.strategies")
else:
    _ci = hypothesis.settings(
        deadline=None,
        max_examples=20,
        derandomize=True,
        database=None,
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.function_scoped_fixture,
        ],
    )
    hypothesis.settings.register_profile("ci", _ci)
    hypothesis.settings.register_profile(
        "thorough", hypothesis.settings(_ci, max_examples=500, derandomize=False)
    )
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish() -> None:
    if hypothesis is None:  # what runs later (torch's own checks, say) must not take it for real
        for name in ("hypothesis", "hypothesis.strategies"):
            sys.modules.pop(name, None)


def pytest_report_header() -> list[str]:
    return [f"torch {torch.__version__}, Hopper GPU: {'yes' if has_hopper() else 'no'}"]


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_hopper():
        return
    skip = pytest.mark.skip(reason="needs a Hopper GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the Hopper GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def environment() -> Iterator[Callable[[str, str | None], None]]:
    """environment(name, value) sets or removes a variable that fp8moe reads once per process."""
    from fp8moe.kernels import registry, status

    def read_again() -> None:
        for reader in (registry.requested_backend, registry._backend, status.debug):
            reader.cache_clear()

    with pytest.MonkeyPatch.context() as patch:

        def change(name: str, value: str | None) -> None:
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
            read_again()

        yield change
    read_again()
