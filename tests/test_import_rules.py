"""The order of the house: a module imports only from layers above its own, or from its own folder without cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "anyfp4"
# each entry may import from the entries before it; members of one entry are one layer
LAYERS = (
    ("errors", "envs", "device"),
    ("formats",),
    ("numerics",),
    ("ops",),
    ("kernels",),
    ("backends",),
    ("functional",),
    ("checkpoint",),
    ("layers",),
    ("models",),
    ("engine",),
    ("llm", "async_llm"),
    ("tools",),
    ("entrypoints",),
    ("__main__",),
    ("integrations",),
    ("testing",),
)
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}
#: only backends import kernels; integrations never import the engine; testing is for tests and benchmarks
ONLY_FROM = {"kernels": {"backends", "kernels"}, "testing": {"testing"}}
NEVER = {("integrations", "engine"), ("integrations", "llm")}
#: modules that the base package must import only inside functions, if at all
LAZY = {
    "transformers",
    "huggingface_hub",
    "gguf",
    "triton",
    "fastapi",
    "uvicorn",
    "compressed_tensors",
    "vllm",
    "jinja2",
}
#: libraries that modules of `integrations/` with that name extend: these import them at once, and their insides too
EXTENDED = ("transformers", "vllm")


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of imported modules; those under `if TYPE_CHECKING` do not count."""
    tree = ast.parse(path.read_text())
    typing_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only.update(ast.walk(node))
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            typing_only.update(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                relative = full.replace(".", "/")
                is_module = (ROOT.parent / f"{relative}.py").exists() or (ROOT.parent / relative).is_dir()
                found.add(full if is_module else base)
    return found


def layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_only_from_layers_above(path: Path) -> None:
    me = name_of(path)
    if me == "anyfp4":
        return
    for other in imports(path):
        if not other.startswith("anyfp4."):
            continue
        mine, theirs = layer(me), layer(other)
        assert theirs in LAYER_OF, f"{other} is in no layer: add it to LAYERS"
        assert mine in LAYER_OF, f"{me} is in no layer: add it to LAYERS"
        assert LAYER_OF[theirs] <= LAYER_OF[mine], f"{me} imports {other}, which lies below it"
        assert mine in ONLY_FROM.get(theirs, {mine}), f"{me} must not import {other}"
        assert (mine, theirs) not in NEVER, f"{me} must not import {other}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_heavy_packages_are_imported_lazily(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    if name_of(path).startswith("anyfp4.kernels.triton."):
        roots.discard("triton")  # these modules are themselves imported inside functions only
    roots -= {library for library in EXTENDED if name_of(path).startswith(f"anyfp4.integrations.{library}")}
    assert not roots & LAZY


def test_only_integrations_reach_into_other_libraries() -> None:
    for path in modules():
        if layer(f"{name_of(path)}.") != "integrations":
            inner = {m for m in imports(path) if m.startswith(tuple(f"{library}." for library in EXTENDED))}
            assert not inner, f"{path} imports {inner}"


def test_triton_kernels_are_imported_lazily() -> None:
    for path in modules():
        if not name_of(path).startswith("anyfp4.kernels.triton"):
            found = imports(path, top_level_only=True)
            assert not any(m.startswith("anyfp4.kernels.triton") for m in found), f"{path} imports Triton kernels"


def test_no_cycles() -> None:
    graph = {name_of(p): {m for m in imports(p) if m.startswith("anyfp4")} for p in modules()}
    graph.pop("anyfp4", None)
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, f"import cycle: {' -> '.join((*trail, node))}"
        if node in done:
            return
        for other in graph.get(node, ()):
            if other != node:
                visit(other, (*trail, node))
        done.add(node)

    for name in graph:
        visit(name, ())


def test_base_import_is_light() -> None:
    code = (
        "import sys, anyfp4; "
        f"heavy = {sorted(LAZY | {'torch', 'numpy', 'rich', 'typer'})!r}; "
        "print([m for m in heavy if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_llm_import_loads_no_optional_package() -> None:
    code = f"import sys, anyfp4; anyfp4.LLM; print([m for m in {sorted(LAZY)!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
