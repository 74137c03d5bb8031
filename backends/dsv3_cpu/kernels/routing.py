"""Which experts a token goes to: scores, groups, choice and weights of one token at a time."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import strict
from dsv3_cpu.constants import MAX, SIGMOID
from dsv3_cpu.kernels.numbers import exp


@strict
def score_row(logits, mode, out):
    """Sigmoid or softmax of one token's logits, in float32."""
    if mode == SIGMOID:
        for e in range(logits.shape[0]):
            x = logits[e]
            out[e] = np.float32(0) if x < np.float32(-87) else np.float32(1) / (np.float32(1) + exp(-x))
        return
    largest = np.float32(-np.inf)
    for e in range(logits.shape[0]):
        largest = logits[e] if logits[e] > largest else largest
    total = np.float32(0)
    for e in range(logits.shape[0]):
        x = logits[e] - largest
        out[e] = np.float32(0) if x < np.float32(-87) else exp(x)
        total += out[e]
    for e in range(logits.shape[0]):
        out[e] /= total


@strict
def best(values, taken):
    """Index of the largest value that is not taken, the lowest of equals; NaN counts as the largest."""
    found = -1
    most = np.float32(0)
    for i in range(values.shape[0]):
        if not taken[i]:
            v = np.float32(np.inf) if values[i] != values[i] else values[i]
            if found < 0 or v > most:
                found, most = i, v
    return found


@strict
def group_value(choice, mode):
    """A group's score: its best choice, or the sum of its two best."""
    a, b = np.float32(-np.inf), np.float32(-np.inf)
    for v in choice:
        if v != v:
            return v
        if v > a:
            a, b = v, a
        elif v > b:
            b = v
    return a if mode == MAX else a + b


@strict
def choose_row(logits, t, bias, n_group, kept, mode, group_mode, renormalize, scale, weights, ids):
    """weights[t] and ids[t] of one token; bias [E], of zeros where there is none."""
    experts, k = logits.shape[1], ids.shape[1]
    width = experts // n_group
    scores, choice = np.empty(experts, np.float32), np.empty(experts, np.float32)
    score_row(logits[t], mode, scores)
    for e in range(experts):
        choice[e] = scores[e] + bias[e]
    taken = np.zeros(experts, np.bool_)
    if n_group > 1:
        values, picked = np.empty(n_group, np.float32), np.zeros(n_group, np.bool_)
        for g in range(n_group):
            values[g] = group_value(choice[g * width : (g + 1) * width], group_mode)
        for _ in range(kept):
            picked[best(values, picked)] = True
        for e in range(experts):
            taken[e] = not picked[e // width]
    total = np.float32(0)
    for j in range(k):
        e = best(choice, taken)
        taken[e] = True
        ids[t, j], weights[t, j] = e, scores[e]
        total += scores[e]
    for j in range(k):
        if renormalize:
            weights[t, j] /= total + np.float32(1e-20)
        weights[t, j] *= np.float32(scale)


def choose(team, me, crew, logits, bias, n_group, kept, mode, group_mode, renormalize, scale, weights, ids):
    """weights [T, k] and ids [T, k] of every token."""
    for t in range(me, logits.shape[0], crew):
        choose_row(logits, t, bias, n_group, kept, mode, group_mode, renormalize, scale, weights, ids)
