"""House rules that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for folder in ("core", "backends", "plugins") for p in (ROOT / folder).rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
HARDWARE = {"triton", "numba", "torch_npu"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_source_file_keeps_the_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(tree), "a module says what it is for"
    in_core = (ROOT / "core") in path.parents
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        roots = {m.partition(".")[0] for m in modules}
        assert not roots & FORBIDDEN_MODULES
        assert not (in_core and roots & HARDWARE), "core knows no hardware"
        assert not (in_core and path.name != "settings.py" and ast.unparse(node) in ("os.environ", "os.getenv")), (
            "settings.py reads it"
        )
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name.rpartition(".")[2] not in FORBIDDEN_CALLS and name != "torch.load", name
            assert "trust_remote_code" not in {k.arg for k in node.keywords}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 75, f"{node.name} is too long"
        if (
            isinstance(node, ast.ExceptHandler)
            and node.type is not None
            and ast.unparse(node.type) in ("Exception", "BaseException")
        ):
            assert node.name, "a broad except keeps the exception"
