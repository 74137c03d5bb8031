"""The mixture of experts: few tokens by one kernel for the whole layer, many sorted and multiplied expert by expert."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_cpu import int8
from dsv3_cpu.linear import FEW, few_into, many_into
from dsv3_cpu.pointwise import silu_mul
from dsv3_cpu.programs import Kernel, float_word, words_of
from dsv3_cpu.routing import GROUP_SCORES, SCORES
from dsv3_cpu.team import hold, run, tile_of
from dsv3_cpu.views import (
    DEFAULT,
    DTYPES,
    Array,
    Config,
    Memory,
    Weight,
    array,
    as_indices,
    dense,
    index_words,
    kept,
    remembered,
    tensor_weight,
    weight,
)

_NOWHERE = np.empty(0, np.int32)  # the expert map where all experts are here
_NOWHERE_WORDS = words_of(_NOWHERE)
_layer_kernel, _fused, _combine = (Kernel(f"experts.{name}") for name in ("layer", "fused", "combine"))
_CODES = {torch.float32: "f4", torch.bfloat16: "u2"}


def grouped_linear(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    return _grouped(x.to(torch.float32), w, offsets.tolist()).to(x.dtype)


def grouped_linear_bf16(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    """Where there are instructions for products of bfloat16."""
    return _grouped(x, w, offsets.tolist())


def fused_experts_many(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    return _sorted(x.to(torch.float32), weights, ids, w13, w2).to(x.dtype)


def fused_experts_bf16(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    """Where there are instructions for products of bfloat16."""
    return _sorted(x, weights, ids, w13, w2)


def _grouped(x: Tensor, w: Prepared, bounds: list[int]) -> Tensor:
    """[M, N] in the dtype of x; experts with few rows in one call, the others by tiles of their weights written out."""
    y = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype)
    y[bounds[-1] :] = 0
    counts = np.diff(bounds)
    if w.quant == "int8-w8a8":
        used = np.flatnonzero(counts > 0)
        int8.rows_into(y, x, weight(w), used, np.concatenate([np.asarray(bounds)[used], [bounds[-1]]]))
        return y
    few = np.flatnonzero((counts > 0) & (counts <= FEW))
    if few.size:
        place = torch.from_numpy(np.concatenate([np.arange(bounds[e], bounds[e + 1]) for e in few]))
        part, rows = torch.empty(place.shape[0], w.shape[1], dtype=x.dtype), x[place]
        few_into(part, rows, weight(w), few, np.concatenate([[0], np.cumsum(counts[few])]))
        y[place] = part
    for e in np.flatnonzero(counts > FEW).tolist():
        many_into(y[bounds[e] : bounds[e + 1]], x[bounds[e] : bounds[e + 1]], w, e)
    return y


def _sorted(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    """Tokens copied into the order of experts; rows of pairs whose expert is elsewhere come last, and count nothing."""
    n_experts, k = w13.shape[0], ids.shape[1]
    flat = ids.reshape(-1).to(torch.int64).numpy()
    key = np.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    order = np.argsort(key, kind="stable")
    bounds = [0, *np.cumsum(np.bincount(key, minlength=n_experts + 1)[:n_experts]).tolist()]
    order = order[: bounds[-1]]
    rows = x.index_select(0, torch.from_numpy(order // k))
    y = _grouped(silu_mul(_grouped(rows, w13, bounds)), w2, bounds)
    place = np.full(flat.size, -1, np.int64)
    place[order] = np.arange(order.size)
    out = torch.empty(x.shape[0], w2.shape[1], dtype=x.dtype)
    _combine(4 * y.numel(), array(y), place, array(weights.to(torch.float32)), array(out))
    return out


def fused_experts_few(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared, config: Config = DEFAULT) -> Tensor:
    """At most FEW tokens. config: tile, see `tile_of`."""
    x, layer = dense(x), _layer(w13, w2, None, None)
    space = layer.space(x.shape[0], ids.shape[1], x.dtype)
    y = torch.empty_like(x)
    routed = (array(weights.to(torch.float32)), array(ids.to(torch.int32)), _NOWHERE)
    layer.run(_fused, space, x, words_of(*routed), y, (), "", config.get("tile"), w13.quant == "int8-w8a8")
    return y


def moe_few(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    w13: Prepared,
    w2: Prepared,
    shared13: Prepared | None,
    shared2: Prepared | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str,
    renormalize: bool,
    scale: float,
    expert_map: Tensor | None,
    config: Config = DEFAULT,
) -> Tensor:
    """At most FEW tokens. config: tile, see `tile_of`."""
    x, layer, router = dense(x), _layer(w13, w2, shared13, shared2), tensor_weight(gate)
    space = layer.space(x.shape[0], topk, x.dtype)
    routing = layer.routing(x.shape[0], topk, gate.shape[0], router.arranged(x.shape[1], x.dtype)[1])
    added = _zeros(gate.shape[0]) if bias is None else kept(bias)
    where = None if expert_map is None else as_indices(expert_map)  # which must outlive the call
    y = torch.empty_like(x)
    more = (
        *router.words, added.ctypes.data, added.shape[0], *routing.more, n_group, topk_group, SCORES[score],
        GROUP_SCORES[group_score], int(renormalize), float_word(float(scale)),
    )  # fmt: skip
    routed = (*routing.words, *(_NOWHERE_WORDS if where is None else index_words(where)))
    signature, snapped = f",{router.signature},f4:1,f4:2,f4:2,i,i,i,i,i,f", w13.quant == "int8-w8a8"
    layer.run(_layer_kernel, space, x, routed, y, more, signature, config.get("tile"), snapped)
    return y


@functools.lru_cache(64)
def _zeros(size: int) -> Array:
    return np.zeros(size, np.float32)


class _Space:
    """Scratch of a call, and its words."""

    def __init__(self, *arrays: Array) -> None:
        self.arrays = arrays
        self.words = words_of(*arrays)
        self.more: tuple[int, ...] = ()


class _Layer:
    """The weights of a layer's experts as a kernel takes them, and scratch for every number of tokens that there was."""

    def __init__(self, w13: Weight, w2: Weight, shared13: Weight | None, shared2: Weight | None) -> None:
        self.w13, self.w2 = w13, w2
        self.shared13 = shared13 or w13.nothing()
        self.shared2 = shared2 or w2.nothing()
        weights = (w13, w2, self.shared13, self.shared2)
        self.words = tuple(word for w in weights for word in w.words)
        self.signature = ",".join(w.signature for w in weights)
        self.programs: dict[Any, int] = {}
        self.kept = threading.local()  # two threads of Python may run one layer

    def space(self, tokens: int, k: int, dtype: torch.dtype) -> _Space:
        """pairs, factor; arranged tokens; hidden numbers, and these arranged."""

        def make() -> _Space:
            width, half, half_shared = self.w13.columns, self.w13.rows // 2, self.shared13.rows // 2

            def room(rows: int, w: Weight, size: int) -> Array:
                code, padded = w.arranged(size, dtype)
                return np.empty((rows, padded if size else 0), DTYPES[code])

            return _Space(
                np.empty((3, tokens * k + 1), np.int64), np.empty(tokens * k, np.float32),
                room(tokens, self.w13, width), room(tokens, self.shared13, width if half_shared else 0),
                np.empty((tokens * k, half), np.float32), np.empty((tokens, half_shared), np.float32),
                room(tokens * k, self.w2, half), room(tokens, self.shared2, half_shared),
            )  # fmt: skip

        return self._made(("space", tokens, k, dtype), make)

    def routing(self, tokens: int, k: int, experts: int, width: int) -> _Space:
        """weights and ids; more: logits and the tokens arranged for the router."""

        def make() -> _Space:
            found = _Space(np.empty((tokens, k), np.float32), np.empty((tokens, k), np.int32))
            more = (np.empty((tokens, experts), np.float32), np.empty((tokens, width), np.float32))
            found.arrays += more
            found.more = words_of(*more)
            return found

        return self._made(("routing", tokens, k), make)

    def _made(self, key: tuple[Any, ...], make: Callable[[], _Space]) -> _Space:
        spaces: dict[Any, _Space] = self.kept.__dict__
        found = spaces.get(key)
        if found is None:
            found = spaces[key] = make()
        hold(found)
        return found

    def run(
        self,
        kernel: Kernel,
        space: _Space,
        x: Tensor,
        routed: tuple[int, ...],
        y: Tensor,
        more: tuple[int, ...],
        signature: str,
        tile: int | None,
        snapped: bool,
    ) -> None:
        """kernel over x [T, H] into y; routed: the words of weights, ids and the expert map; more: of what comes after y."""
        pairs, scratch = space.words[:5], space.words[5:]
        size = (x.data_ptr(), *x.shape)
        tile = tile_of(min(self.w13.rows, self.w2.rows), tile)
        words = (*self.words, tile, int(snapped), *pairs, *size, *routed, *scratch, y.data_ptr(), *y.shape, *more)
        program = self.programs.get((signature, x.dtype))
        if program is None:
            code = _CODES[x.dtype]
            x13, xs, a, shared_a = (w.arranged(1, x.dtype)[0] + ":2" for w in (self.w13, self.shared13, self.w2, self.shared2))
            spaces = f"{x13},{xs},f4:2,f4:2,{a},{shared_a}"
            known = f"{self.signature},i,i,i8:2,f4:1,{code}:2,f4:2,i4:2,i4:1,{spaces},{code}:2{signature}"
            program = self.programs[signature, x.dtype] = kernel.program(known)
        run(program, self.w13.expert_bytes * min(self.w13.experts, routed[1] * routed[2]), words)


_layers: Memory = {}


def _layer(w13: Prepared, w2: Prepared, shared13: Prepared | None, shared2: Prepared | None) -> _Layer:
    def make() -> _Layer:
        both = (None, None) if shared13 is None or shared2 is None else (weight(shared13), weight(shared2))
        return _Layer(weight(w13), weight(w2), *both)

    memory = _layers if shared13 is None else _whole_layers
    parts = [part for part in (w13, w2, shared13, shared2) if part is not None]
    return remembered(memory, tuple(tensor for part in parts for tensor in part.tensors.values()), make)


_whole_layers: Memory = {}
