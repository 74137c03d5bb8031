"""The paged latent cache as rows [pages * page_size, width]."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value, work_dtype
from dsv3.export.emit.arguments import Cache
from dsv3.export.emit.quantize import act_quant, repeat
from dsv3.export.emit.rope import apply_rope
from dsv3.quant.fp8 import BLOCK


def kv_cache_write(g: Graph, ckv: Value, kpe: Value, slots: Value, cache: Cache) -> None:
    if cache.scale is not None:
        codes, scale = act_quant(g, ckv, BLOCK, cache.ckv.dtype, width=cache.rank)
        cache.ckv = _store(g, cache.ckv, codes, slots)
        cache.scale = _store(g, cache.scale, scale, slots)
    else:
        cache.ckv = _store(g, cache.ckv, ckv, slots)
    cache.kpe = _store(g, cache.kpe, kpe, slots)


def _store(g: Graph, plane: Value, rows: Value, slots: Value) -> Value:
    """plane[slot] = row; a negative slot writes to a row behind the last, which is cut off again."""
    work = work_dtype(plane.dtype)
    flat = g.op("Reshape", plane.to(work), g.shape(-1, g.size(plane, 2)))
    end = g.size(flat, 0)
    padded = g.op("Pad", flat, g.ints(0, 0, 1, 0))
    slot = slots.to("int64")
    place = g.unsqueeze(g.where(slot < 0, end, slot), 1)
    written = g.op("ScatterND", padded, place, rows.to(plane.dtype).to(work))
    return g.op("Reshape", g.slice(written, 0, 0, end), g.op("Shape", plane, dtype="int64")).to(plane.dtype)


def read_latents(g: Graph, cache: Cache, rows: Value, dtype: str) -> tuple[Value, Value]:
    """ckv [n, R] and kpe [n, P] of the given rows in dtype, dequantised if the cache is FP8."""
    work = work_dtype(dtype)
    kpe = _rows(g, cache.kpe, rows, cache.rope)
    ckv = _rows(g, cache.ckv, rows, cache.rank).to(work)
    if cache.scale is not None:
        groups = -(-cache.rank // BLOCK)
        ckv = ckv * repeat(g, _rows(g, cache.scale, rows, groups).to(work), cache.rank, BLOCK)
    return ckv.to(dtype), kpe.to(dtype)


def _rows(g: Graph, plane: Value, rows: Value, width: int) -> Value:
    return g.gather(g.reshape(g.work(plane), -1, width), rows)


def kv_cache_gather(
    g: Graph, cache: Cache, block_table: Value, seq_lens: Value, total: int, start: int = 0
) -> tuple[Value, Value]:
    long = seq_lens.to("int64") - start
    lengths = g.where(long < 0, 0, long)
    ends = g.op("CumSum", lengths, g.const(0, "int64"))
    row = g.arange(total)
    sequence = g.count(g.unsqueeze(ends, 0) <= g.unsqueeze(row, 1), 1)
    position = row - g.gather(ends - lengths, sequence) + start
    block = position / cache.page_size
    index = g.concat([g.unsqueeze(sequence, 1), g.unsqueeze(block, 1)], 1)
    pages = g.op("GatherND", block_table.to("int64"), index)
    return read_latents(g, cache, pages * cache.page_size + position - block * cache.page_size, cache.kpe.dtype)


def rope_cache_write(
    g: Graph,
    q_pe: Value,
    kpe: Value,
    ckv: Value,
    positions: Value,
    cos_sin: Value,
    slots: Value,
    cache: Cache,
    interleaved: bool = True,
) -> Value:
    key = apply_rope(g, g.unsqueeze(g.work(kpe), 1).to(kpe.dtype), positions, cos_sin, interleaved)
    kv_cache_write(g, ckv, g.squeeze(g.work(key), 1).to(kpe.dtype), slots, cache)
    return apply_rope(g, q_pe, positions, cos_sin, interleaved)
