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
TORCH_FREE = [
    "star_dist.config",
    "star_dist.scales",
    "star_dist.cli",
    "star_dist.object_store",
    "star_dist.process",
    "star_dist.submission",
    "star_dist.train.checkpoint",
    "star_dist.train.dry_run",
    "star_dist.train.planning",
    "star_dist.train.status",
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
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


@pytest.mark.parametrize("module", TORCH_FREE)
def test_modules_of_login_nodes_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_forgotten_names() -> None:
    forbidden = {"utils", "misc", "helpers", "common", "dist"}
    assert not [relative(path) for path in SOURCES if path.stem in forbidden]
