"""The bundled checkpoint on emulated devices: the reference's tokens, but where two of them are as good as equal."""

from functools import cache

import pytest

import dsv3
from dsv3.conformance.model import same_text

pytest.importorskip("triton")

DEVICES = (("cuda", "sm_90"), ("cuda", "sm_80"), ("rocm", "gfx942"), ("rocm", "gfx950"))
# What rounding to bfloat16 on the way moves a row of logits by, relative to its largest.
FLOOR = 2e-3


@cache
def _reference(quant, kv_dtype):
    return dsv3.load("demo", backend="reference", quant=quant, kv_dtype=kv_dtype)


def _compared(backend, arch, kv_dtype, tokens, draft=None):
    model = dsv3.load("demo", backend=backend, emulate=arch, kv_dtype=kv_dtype)
    placement = model.placement()
    plain = _reference(placement.quant, kv_dtype)
    prompt = model.tokenizer.encode("Once upon a time")
    ours, theirs = (
        m.generate(prompt, max_new_tokens=tokens, ignore_eos=True, draft=d).ids for m, d in ((model, draft), (plain, None))
    )
    answer = same_text(plain, prompt, theirs, ours, FLOOR, "emulated")
    assert answer[2] == "", answer[2]
    assert len(ours) == tokens
    return placement


def _tells_the_story(backend, arch, tokens):
    placement = _compared(backend, arch, None, tokens)
    assert placement.quant == ("fp8-w8a16" if arch == "sm_80" else "fp8-w8a8")
    assert "emulated" in placement.summary
    assert any("rounding" in note for note in placement.notes)
    assert placement.fallbacks() == []


def test_the_demo_begins_as_the_references_story():
    _tells_the_story("rocm", "gfx942", 2)


@pytest.mark.emulated
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend, arch", DEVICES)
def test_the_demo_tells_the_references_story(backend, arch):
    _tells_the_story(backend, arch, 24)


@pytest.mark.emulated
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend, arch", DEVICES)
def test_the_demo_with_drafts_and_an_fp8_cache(backend, arch):
    _compared(backend, arch, "fp8", 16, draft="mtp")
