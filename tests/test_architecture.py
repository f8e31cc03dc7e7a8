"""The import directions of the house, read from the source without importing it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("star_dist", "launcher", "data_prep") for path in sorted((ROOT / folder).rglob("*.py"))]
SINGLE_DEVICE = (
    "star_dist/model/",
    "star_dist/scales.py",
    "star_dist/tokenizer/vqvae.py",
    "star_dist/tokenizer/quantizer.py",
)
ALLOWED_IN_SINGLE_DEVICE = {"torch", "star_dist.model", "star_dist.scales", "star_dist.tokenizer"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_import_directions(path: Path) -> None:
    name = relative(path)
    for module in imports(path):
        top = module.split(".")[0]
        if name.startswith("star_dist/"):
            assert top not in ("launcher", "data_prep", "tests")
        if top == "deepspeed":
            assert name == "star_dist/train/engine.py"
        if top in ("flash_attn", "flash_attn_interface"):
            assert name == "star_dist/model/kernels/flash.py"
        elif name.startswith(SINGLE_DEVICE) and top not in sys.stdlib_module_names:
            assert any(module == allowed or module.startswith(allowed + ".") for allowed in ALLOWED_IN_SINGLE_DEVICE)
            assert not module.startswith("torch.distributed")
        if name.startswith(SINGLE_DEVICE):
            assert module != "os"


def test_modules_that_promise_it_import_no_torch() -> None:
    """Login nodes run them, which may have no torch, and where importing it takes seconds."""
    promising = [path for path in SOURCES if "no torch" in (ast.get_docstring(ast.parse(path.read_text())) or "")]
    modules = [relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in promising]
    assert "star_dist.submission" in modules
    code = "import importlib, sys\nfor module in sys.argv[1:]:\n    importlib.import_module(module)\n"
    code += "    if 'torch' in sys.modules:\n        sys.exit(module)"
    checked = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_no_forgotten_names() -> None:
    forbidden = {"utils", "misc", "helpers", "common", "dist"}
    assert not [relative(path) for path in SOURCES if path.stem in forbidden]
