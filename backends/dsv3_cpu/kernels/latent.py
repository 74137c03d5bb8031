"""The latent cache inside kernels: reading and writing its rows.

A plane is flat storage with a page and a slot stride; its numbers are float32, bfloat16 (uint16) or FP8 codes (int8) with one
float32 scale per 128.
"""

from __future__ import annotations

import numpy as np
from numba.core import types

from dsv3_cpu.compile import overloads
from dsv3_cpu.constants import GROUP
from dsv3_cpu.kernels.numbers import fp8, put, to_fp8, widen

_LARGEST = np.float32(448)
_FLOOR = np.float32(1e-4)


def read(flat, base, scales, where, rank, out, i):
    """The latent of rank numbers at flat[base] as float32 in out[i]; the scales of FP8 are at scales[where]."""


@overloads(read)
def _read(flat, base, scales, where, rank, out, i):
    def coded(flat, base, scales, where, rank, out, i):
        for g in range((rank + GROUP - 1) // GROUP):
            factor = scales[where + g]
            for r in range(g * GROUP, min((g + 1) * GROUP, rank)):
                out[i, r] = (fp8(flat[base + r]) * np.float32(256)) * factor

    def real(flat, base, scales, where, rank, out, i):
        for r in range(rank):
            out[i, r] = widen(flat[base + r])

    return coded if flat.dtype == types.int8 else real


def write(x, t, flat, base, scales, where):
    """The latent x[t] into the cache; FP8 as act_quant makes it, with a division by the scale."""


@overloads(write)
def _write(x, t, flat, base, scales, where):
    def coded(x, t, flat, base, scales, where):
        for g in range((x.shape[1] + GROUP - 1) // GROUP):
            first, last = g * GROUP, min((g + 1) * GROUP, x.shape[1])
            most = _FLOOR
            for r in range(first, last):
                size = abs(widen(x[t, r]))
                if size != size:
                    most = size
                    break
                most = size if size > most else most
            scale = most / _LARGEST
            scales[where + g] = scale
            for r in range(first, last):
                value = widen(x[t, r]) / scale
                value = _LARGEST if value > _LARGEST else value
                value = -_LARGEST if value < -_LARGEST else value
                flat[base + r] = to_fp8(value)

    def real(x, t, flat, base, scales, where):
        for r in range(x.shape[1]):
            put(flat, base + r, widen(x[t, r]))

    return coded if flat.dtype == types.int8 else real


def store(team, me, crew, ckv, kpe, slots, page_size, latents, lp, ls, keys, kp, ks, scales, sp, ss):
    """Rows ckv [T, R] and kpe [T, P] into the slots that are not negative."""
    for t in range(me, slots.shape[0], crew):
        slot = np.int64(slots[t])
        if slot >= 0:
            page, offset = slot // page_size, slot % page_size
            write(ckv, t, latents, page * lp + offset * ls, scales, page * sp + offset * ss)
            for p in range(kpe.shape[1]):
                put(keys, page * kp + offset * ks + p, widen(kpe[t, p]))


def gather(team, me, crew, table, lengths, ends, start, page_size, latents, lp, ls, keys, kp, ks, scales, sp, ss, ckv, kpe):
    """Rows start to length of every sequence, back to back, float32; ends [S]: where each ends."""
    for s in range(me, lengths.shape[0], crew):
        for position in range(start, np.int64(lengths[s])):
            row = ends[s] - np.int64(lengths[s]) + position
            page, offset = np.int64(table[s, position // page_size]), position % page_size
            read(latents, page * lp + offset * ls, scales, page * sp + offset * ss, ckv.shape[1], ckv, row)
            base = page * kp + offset * ks
            for p in range(kpe.shape[1]):
                kpe[row, p] = widen(keys[base + p])
