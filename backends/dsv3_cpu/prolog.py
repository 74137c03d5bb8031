"""Everything of absorbed attention before the attention itself, for a few tokens, by one kernel."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import LatentCache, Prepared
from dsv3_cpu.programs import Kernel, float_word, signature_of, words_of
from dsv3_cpu.team import hold, run, tile_of
from dsv3_cpu.views import (
    CODES,
    DEFAULT,
    DTYPES,
    Config,
    Memory,
    as_indices,
    dense,
    flat,
    index_words,
    kept,
    kept_words,
    planes,
    remembered,
    weight,
)

_prolog = Kernel("prolog.prolog")


def mla_prolog(
    x: Tensor,
    weights: Mapping[str, Any],
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: LatentCache,
    eps: float,
    n_heads: int,
    config: Config = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """config: tile, see `tile_of`."""
    x, known, snapped = dense(x), _weights(weights), weights["kv_a"].quant == "int8-w8a8"
    tokens, rope = x.shape[0], cache.kpe.shape[2]
    q_c = torch.empty(tokens, n_heads, known.rank, dtype=x.dtype)
    q_pe = torch.empty(tokens, n_heads, rope, dtype=x.dtype)
    place, to = as_indices(positions), as_indices(slots)
    words = (
        *known.words, x.data_ptr(), *x.shape, *index_words(place), *kept_words(cos_sin), *index_words(to),
        cache.ckv.shape[1], *planes(cache), float_word(float(eps)),
        tile_of(known.kv_a.rows + known.q_a.rows, config.get("tile")), int(snapped), *known.scratch(tokens, x.dtype, n_heads),
        q_c.data_ptr(), *q_c.shape, q_pe.data_ptr(), *q_pe.shape,
    )  # fmt: skip
    key = (x.dtype, cache.ckv.dtype, cache.kpe.dtype)
    program = known.programs.get(key)
    if program is None:
        code, plane, keys = (CODES[dtype] for dtype in key)
        cached = f"{plane}:1,i,i,{keys}:1,i,i,f4:1,i,i"
        q_a, kv_a, q_b = (w.arranged(1, x.dtype)[0] + ":2" for w in (known.q_a, known.kv_a, known.q_b))
        step = f"{code}:2,i4:1,f4:2,i4:1,i,{cached},f,i,i,{q_a},{kv_a},f4:2,{q_b},f4:2,f4:2,f4:3,{code}:3,{code}:3"
        program = known.programs[key] = _prolog.program(f"{known.signature},{step}")
    run(program, known.bytes, words)
    return q_c, q_pe


class _Weights:
    """The weights of one layer as the kernel takes them, and scratch for every number of tokens that there was."""

    def __init__(self, weights: Mapping[str, Prepared | Tensor]) -> None:
        second = weights.get("q_b", weights.get("q"))
        self.q_b, self.kv_a = weight(_prepared(second)), weight(_prepared(weights["kv_a"]))
        low = weights.get("q_a")
        self.q_a = self.q_b.nothing() if low is None else weight(_prepared(low))
        uk, norm = _tensor(weights["w_uk"]), kept(_tensor(weights["kv_a_norm"]))
        q_norm = np.empty(0, norm.dtype) if low is None else kept(_tensor(weights["q_a_norm"]))
        self.rank, self.up = int(uk.shape[2]), flat(uk)
        parts = (self.q_a, self.q_b, self.kv_a)
        self.others = others = (q_norm, norm, self.up)  # what words are the addresses of
        self.words = (*(word for w in parts for word in w.words), *words_of(*others), *uk.stride())
        self.signature = ",".join([*(w.signature for w in parts), signature_of(others), "i,i,i"])
        self.bytes = sum(w.expert_bytes for w in parts)
        self.programs: dict[Any, int] = {}
        self._spaces = threading.local()  # two threads of Python may run one layer

    def scratch(self, tokens: int, dtype: torch.dtype, heads: int) -> tuple[int, ...]:
        """The words of the kernel's scratch."""
        spaces: dict[Any, Any] = self._spaces.__dict__
        found = spaces.get((tokens, dtype))
        if found is None:
            width, low = self.kv_a.columns, self.q_a.rows
            kinds = (
                self.q_a.arranged(width if low else 0, dtype), self.kv_a.arranged(width, dtype), ("f4", low),
                self.q_b.arranged(low or width, dtype), ("f4", self.kv_a.rows), ("f4", self.q_b.rows),
            )  # fmt: skip
            arrays: list[Any] = [np.empty((tokens, size), DTYPES[code]) for code, size in kinds]
            arrays.append(arrays[-1].reshape(tokens, heads, self.q_b.rows // heads))
            found = spaces[tokens, dtype] = arrays, words_of(*arrays)
        hold(found)
        words: tuple[int, ...] = found[1]
        return words


def _prepared(w: Any) -> Prepared:
    if not isinstance(w, Prepared):
        raise TypeError(f"a weight of mla_prolog is a {type(w).__name__}, not Prepared")
    return w


def _tensor(w: Any) -> Tensor:
    if not isinstance(w, Tensor):
        raise TypeError(f"a weight of mla_prolog is a {type(w).__name__}, not a tensor")
    return w


_known: Memory = {}


def _weights(weights: Mapping[str, Any]) -> _Weights:
    tensors: list[Tensor] = []
    for part in (weights["kv_a"], *(part for name, part in weights.items() if name != "kv_a")):
        tensors += part.tensors.values() if isinstance(part, Prepared) else (part,)
    return remembered(_known, tuple(tensors), lambda: _Weights(weights))
