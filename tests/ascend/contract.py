"""Calls of every function of `dsv3_ascend.npu`, watched: what they ask of the vendor, and what comes back."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import dsv3_ascend
from dsv3_ascend import cpu, npu
from tests.support import torch_npu_rules as rules

BF16, F32, I8 = torch.bfloat16, torch.float32, torch.int8
T, K, N, E, H, I, TOP = 6, 256, 128, 5, 192, 64, 3


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=I8)


def _real(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, dtype=F32).to(dtype)


_ENDS, _COUNTS = torch.tensor([4, 4, 9, 15, 18]), torch.tensor([4, 0, 5, 6, 3])
_IDS = torch.tensor([[0, 2, 5], [3, 5, 4], [1, 0, 2], [5, 5, 5], [2, 3, 4], [0, 1, 2]], dtype=torch.int32)
_SUMS = torch.randint(-9999, 9999, (18, 2 * I), dtype=torch.int32)
_TABLE = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)


def _latent(ends: list[int], lengths: list[int]) -> tuple[Any, ...]:
    t = ends[-1]
    cached = (_real(4, 128, 512), _real(4, 128, 64))
    return (_real(t, 8, 512), _real(t, 8, 64), *cached, _TABLE, ends, lengths, 0.1)


def _packed(causal: bool) -> tuple[Any, ...]:
    return (_real(9, 4, 192), _real(12, 4, 192), _real(12, 4, 128), [5, 9], [5, 12], 0.1, causal)


# Function -> argument tuples: one for every form in which kernels call it.
CALLS: dict[str, list[tuple[Any, ...]]] = {
    "rms_norm": [(_real(T, K, dtype=F32), _real(K, dtype=F32), 1e-6)],
    "add_rms_norm": [(_real(T, K, dtype=F32), _real(T, K, dtype=F32), _real(K, dtype=F32), 1e-6)],
    "swiglu": [(_real(T, 2 * I),), (_real(T, 2 * I, dtype=F32),)],
    "dynamic_quant": [(_real(T, K),)],
    "quant_matmul": [
        (_codes(T, K), weight, torch.rand(N), torch.rand(T)) for weight in (_codes(K, N), _codes(N, K).t())
    ],
    "weight_quant_matmul": [
        (_real(T, K), _codes(N, K).t(), torch.ones(1, N, dtype=BF16), 0),
        (_real(T, K), torch.zeros(K, N // 8, dtype=torch.int32), _real(K // 128, N), 128),
        (_real(T, 128), torch.zeros(128, N // 8, dtype=torch.int32), _real(1, N), 0),
    ],
    "int4_pack": [(torch.randint(-8, 8, (K, N), dtype=torch.int32),)],
    "grouped_matmul": [(_real(18, K), _real(E, N, K).transpose(1, 2), _ENDS)],
    "grouped_int8_matmul": [(_codes(18, K), _codes(E, K, N), _ENDS)],
    "grouped_weight_quant_matmul": [(_real(18, K), _codes(E, N, K).transpose(1, 2), _ENDS)],
    "dequant_swiglu_quant": [(_SUMS, torch.rand(E, 2 * I), torch.rand(18), _COUNTS)],
    "gating_top_k": [
        (torch.randn(T, 16), torch.randn(16), 4, 2, TOP, True, True, 2.5),
        (torch.randn(T, 16), None, 4, 2, TOP, False, False, 16.0),
        (torch.randn(T, 16), None, 1, 1, TOP, True, True, 1.0),
    ],
    "init_routing": [(_codes(T, H), _IDS, E, torch.rand(T)), (_real(T, H), _IDS, E, None)],
    "rotary_mul": [
        (_real(1, T, 4, 64, dtype=F32), torch.rand(1, T, 1, 64), torch.rand(1, T, 1, 64), interleaved)
        for interleaved in (True, False)
    ],
    "transpose_batchmatmul": [(_real(T, 4, 128), _real(4, 128, 512)), (_real(T, 4, 512), _real(4, 512, 128))],
    "latent_attention": [_latent([1, 2], [140, 7]), _latent([3, 4], [140, 7])],
    "packed_attention": [_packed(True), _packed(False)],
    "to_nz": [(_codes(K, N),), (_codes(E, K, N),)],
    "to_nd": [(_codes(K, N),)],
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Every call of an operator of namespace npu goes through the vendor's shape rule, then through our reading of its
    page; `seen` names them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "npu":
            name = func._schema.name.partition("::")[2]
            self.seen.append(name)
            rules.check(name, _by_name(func._schema, args, kwargs or {}))
        return found


def _by_name(schema: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    found = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    return {**found, **{a.name: v for a, v in zip(schema.arguments, args, strict=False)}, **kwargs}


def to_meta(value: Any) -> Any:
    """Tensors as meta tensors with the same strides; everything else as it is."""
    return tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, value)


def outline(value: Any) -> Any:
    """Shapes and dtypes."""
    flat = value if isinstance(value, tuple) else (value,)
    return [(tuple(t.shape), str(t.dtype)) for t in flat]


def hold(function: str, layer: types.ModuleType = npu) -> list[str]:
    """Call a function of the vendor's layer on meta tensors in all its forms; the operators that it called. What comes back
    must be what `cpu` gives, in shape and dtype."""
    layer_cache(layer)
    with Watch() as watch:
        for arguments in CALLS[function]:
            found = outline(getattr(layer, function)(*to_meta(arguments)))
            expected = outline(getattr(cpu, function)(*arguments))
            assert found == expected, f"{function} gives {found}; expected {expected}"
    return watch.seen


def layer_cache(layer: types.ModuleType) -> None:
    layer._hidden.cache_clear()


def functions(layer: types.ModuleType) -> dict[str, Callable[..., Any]]:
    """The public functions that a module defines."""
    return {n: f for n, f in vars(layer).items() if inspect.isfunction(f) and f.__module__ == layer.__name__ and n[0] != "_"}


def vendor_calls(source: str) -> Iterator[ast.Call]:
    """The calls of torch.ops.npu.* in a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _of_vendor(node.func):
            yield node


def _of_vendor(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops.npu"


def sources() -> dict[str, str]:
    """The modules of the package, by name."""
    folder = Path(dsv3_ascend.__file__).parent
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def mutated(change: Callable[[ast.Module], Any]) -> types.ModuleType:
    """`dsv3_ascend.npu` from a changed source."""
    tree = ast.parse(sources()["npu.py"])
    change(tree)
    layer = types.ModuleType("dsv3_ascend.npu")
    exec(compile(ast.unparse(ast.fix_missing_locations(tree)), "npu.py", "exec"), layer.__dict__)
    return layer
