"""The import rule of the layers, and that importing the package stays away from the GPU driver."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fp8moe"

LAYER_OF = {
    "kernels": "kernels",
    "config": "config",
    "quant": "quant",
    "functional": "functional",
    "modules": "modules",
    "integrations": "integrations",
    "testing": "testing",
    "timing": "testing",
    "shapes": "tools",
    "warmup": "tools",
    "doctor": "tools",
    "bench": "tools",
    "cli": "tools",
    "__init__": "names",
}
"""The layer of each file and folder of the package."""

MAY_IMPORT = {
    "kernels": set(),
    "config": set(),
    "quant": {"kernels"},
    "functional": {"kernels", "quant", "config"},
    "modules": {"functional", "quant", "config"},
    "integrations": {"modules", "functional", "quant", "config"},
    "testing": {"kernels", "quant"},
    "tools": {"names", "kernels", "quant", "config", "functional", "modules", "testing"},
    "names": {"kernels", "quant", "config", "functional", "modules", "integrations", "testing"},
}
"""What each layer may import beside itself."""

THIRD_PARTY = {"torch"}  # at module level, anywhere
LAZY_THIRD_PARTY = {  # inside functions only
    "kernels": {"cuda"},
    "quant": {"safetensors"},
    "modules": {"einops"},
    "integrations": {
        "einops",
        "transformers",
        "deepspeed",
        "peft",
        "accelerate",
        "safetensors",
    },
}


@dataclass(frozen=True)
class Import:
    target: str  # dotted; for "from a import b" both "a" and "a.b" where that is a module
    line: int
    lazy: bool


def imports_of(source: str) -> Iterator[Import]:
    """Every import statement; lazy when inside a function or an ``if TYPE_CHECKING`` block."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write absolute imports"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, lazy)
        else:
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, lazy or inside or typing_only)

    yield from visit(ast.parse(source), lazy=False)


def violations(layer: str, source: str) -> list[str]:
    """What the imports of a file in ``layer`` break, one sentence each."""
    found = []
    for item in imports_of(source):
        top, *rest = item.target.split(".")
        if top == "fp8moe":
            part = rest[0] if rest else "__init__"
            target = LAYER_OF.get(part, "names")  # "from fp8moe import MoE" imports a name
            if target != layer and target not in MAY_IMPORT[layer]:
                found.append(f"line {item.line}: {layer} imports {item.target} ({target})")
        elif top not in sys.stdlib_module_names and top not in THIRD_PARTY:
            if top not in LAZY_THIRD_PARTY.get(layer, set()):
                found.append(f"line {item.line}: {layer} imports {top}")
            elif not item.lazy:
                found.append(f"line {item.line}: {layer} imports {top} outside a function")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path: Path) -> None:
    part = part_of(path)
    assert part in LAYER_OF, f"give {part} a layer in LAYER_OF, and in CONTRIBUTING.md"
    assert violations(LAYER_OF[part], path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("layer", "source", "broken"),
    [
        ("kernels", "from fp8moe.quant import per_token", True),
        ("kernels", "from fp8moe import config", True),
        ("kernels", "import fp8moe", True),
        ("kernels", "def f():\n    from fp8moe.modules import moe", True),
        ("kernels", "import numpy", True),
        ("kernels", "from cuda.bindings import driver", True),
        ("kernels", "def f():\n    from cuda.bindings import driver", False),
        ("kernels", "import ctypes, torch\nfrom fp8moe.kernels import jit", False),
        ("quant", "from fp8moe.functional import swiglu_experts", True),
        ("quant", "from fp8moe import kernels", False),
        ("functional", "from fp8moe.modules.moe import MoE", True),
        ("functional", "from fp8moe import MoE", True),
        ("modules", "from fp8moe.kernels import gemm", True),
        ("modules", "from fp8moe.functional import swiglu_experts", False),
        ("integrations", "import transformers", True),
        ("integrations", "if TYPE_CHECKING:\n    import transformers", False),
        ("integrations", "class A:\n    def f(self):\n        import transformers", False),
    ],
)
def test_the_walker_sees_what_it_must(layer: str, source: str, broken: bool) -> None:
    assert bool(violations(layer, source)) == broken


def public_files() -> list[Path]:
    return sorted(p for folder in ("recipes", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", public_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_and_benchmarks_use_no_private_names(path: Path) -> None:
    source = path.read_text(encoding="utf-8").replace("from . import", "from recipe import")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if names[0] == "fp8moe":
                private = [n for n in names if n.startswith("_") and not n.startswith("__")]
                assert not private, f"{path}:{node.lineno} imports {private}"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_touches_no_gpu_driver() -> None:
    code = """
import sys, torch
def loaded():  # torch itself may import the bindings or load libraries
    lines = open("/proc/self/maps").read().split()
    libraries = {path for path in lines if "libcuda.so" in path or "libnvrtc" in path}
    return libraries | {module for module in sys.modules if module.startswith("cuda.")}
before = loaded()
import fp8moe
for name in fp8moe.__all__:
    getattr(fp8moe, name)
import fp8moe.cli
assert loaded() == before, loaded() - before
assert not torch.cuda.is_initialized()
print("clean")
"""
    assert run(code) == "clean"


def test_command_line_starts_without_torch() -> None:
    assert run("import sys, fp8moe.cli; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", PACKAGE / "kernels" / "__init__.py"])
def test_public_names_exist_for_python_and_for_type_checkers(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).parent.parts)
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None
    typed = {item.target.split(".")[-1] for item in imports_of(path.read_text()) if item.lazy}
    assert typed == set(module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018
