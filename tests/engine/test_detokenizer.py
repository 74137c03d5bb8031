"""Text in pieces is the whole text, with the demo's tokenizer and with DeepSeek's; whose ids are the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.engine.text import Detokenizer, Tokenizer
from tests.support.tokenizers import deepseek_tokenizer, tokenizer_of

NAMES = st.sampled_from(["demo", "deepseek"])
BYTES = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    growing = Detokenizer(tokenizer)
    return [*(growing.push(i) for i in ids), growing.finish()]


def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens of one byte each: any mix of them is a text with broken characters."""
    found = [i for c in BYTES if (i := tokenizer.token_id(c)) is not None]
    assert len(found) == 256
    return found


@settings(max_examples=150, deadline=None)
@given(NAMES, st.data())
def test_pieces_join_to_the_whole_text_for_any_ids(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 5), max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(NAMES, st.data())
def test_pieces_join_for_broken_characters_and_special_tokens_among_them(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    some = st.sampled_from([*byte_ids(tokenizer), 0, 1])
    bytes_ = st.lists(st.one_of(some, st.sampled_from(byte_ids(tokenizer)[128:])), max_size=100)
    ids = data.draw(bytes_)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.data())
def test_pieces_join_for_long_runs_without_a_character(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    high = byte_ids(tokenizer)[128:]
    pattern = data.draw(st.lists(st.sampled_from([*high, 0]), min_size=1, max_size=5))
    ids = [*data.draw(st.lists(st.sampled_from(high), max_size=5)), *pattern * 60, *tokenizer.encode_literal("so é")]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1] == "", "what follows is shown at once"


@settings(max_examples=150, deadline=None)
@given(NAMES, st.text(max_size=30), st.data())
def test_a_cut_text_is_shown_as_far_as_its_characters_go(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode_literal(text)
    assert tokenizer.decode(ids) == text
    cut = data.draw(st.integers(0, len(ids)))
    shown = pieces_of(tokenizer, ids[:cut])
    assert "".join(shown) == tokenizer.decode(ids[:cut])
    assert text.startswith("".join(shown[:-1])), "nothing shown is taken back"
    assert "".join(pieces_of(tokenizer, ids)[:-1]) == text or text.endswith("\ufffd"), "a whole text leaves nothing to the end"


@pytest.mark.parametrize("name", ["demo", "deepseek"])
def test_a_character_never_completed_does_not_slow_the_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(name)
    lead = tokenizer.token_id("ð")  # the byte F0
    assert lead is not None
    decoded = 0
    decode = tokenizer.decode

    def counted(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    for token in (lead, 0):
        monkeypatch.setattr(tokenizer, "decode", counted)
        growing = Detokenizer(tokenizer)
        decoded, ids = 0, [lead, *[token] * 2000]
        text = "".join(growing.push(i) for i in ids)
        assert decoded < 100 * len(ids)
        monkeypatch.undo()
        assert text + growing.finish() == tokenizer.decode(ids)


def test_deepseeks_tokenizer_gives_the_published_ids(shared_data: Path) -> None:
    tokenizer = deepseek_tokenizer()
    path = shared_data / "data" / "tokenizer" / "deepseek-v3-vectors.json"
    vectors = json.loads(path.read_text(encoding="utf-8"))["vectors"]
    assert len(vectors) > 40
    for vector in vectors:
        assert tokenizer.encode_plain(vector["text"]) == vector["ids"], vector["text"]
        assert "".join(pieces_of(tokenizer, vector["ids"])) == tokenizer.decode(vector["ids"])
