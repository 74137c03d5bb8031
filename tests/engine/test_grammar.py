"""Texts that grammars ask for: what looks like a control token is letters, and no mask lets a control token into a text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsv3.engine import grammar as module
from dsv3.engine.grammar import Grammar
from dsv3.errors import UsageError
from tests.support.tokenizers import tokenizer_of, v32_tokenizer

LOOKALIKES = [
    "<think>", "</think>", "<｜User｜>", "<｜end▁of▁sentence｜>", "｜DSML｜", "<｜tool▁sep｜>", "a<think>b", "<|EOT|>",
    "</｜DSML｜parameter>",
]  # fmt: skip
SIZE = 129280


def forced(grammar: Grammar, eos: int) -> list[int]:
    """What comes of always taking the first token that is allowed."""
    found: list[int] = []
    while not grammar.finished and len(found) < 100:
        allowed = [int(i) for i in np.flatnonzero(grammar.masks([])[0].numpy()) if i != eos]
        if not allowed:
            break
        grammar.accept(allowed[0])
        found.append(allowed[0])
    return found


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
@pytest.mark.parametrize("text", LOOKALIKES)
def test_what_looks_like_a_control_token_is_spelt(text: str, kind: str) -> None:
    tokenizer = v32_tokenizer()
    schema, lark = json.dumps({"enum": [text]}), f"start: {json.dumps(text)}"
    asked = {"json_schema": schema, "regex": text.replace("|", "\\|"), "lark": lark}[kind]
    found = forced(Grammar.of(tokenizer, kind, asked, [1], SIZE), 1)
    assert tokenizer.decode(found) == (json.dumps(text, ensure_ascii=False) if kind == "json_schema" else text)
    assert not {tokenizer.token_id(name) for name in tokenizer.control} & set(found)


@pytest.mark.parametrize("name", ["demo", "deepseek"])
def test_no_control_token_is_text_and_all_else_is(name: str) -> None:
    tokenizer = tokenizer_of(name)
    eos, size = tokenizer.eos, tokenizer.size
    assert eos is not None
    mask = Grammar.of(tokenizer, "regex", "(?s:.*)", [eos], size).masks([])[0].tolist()
    control = {tokenizer.token_id(text) for text in tokenizer.control}
    assert mask[eos] and not any(mask[i] for i in control if i is not None and i != eos)
    for text in ("a", " the", "\n", "京", "Once upon"):
        assert mask[tokenizer.encode_literal(text)[0]], text


def test_a_control_token_that_a_grammar_names_is_the_token() -> None:
    tokenizer = v32_tokenizer()
    end = tokenizer.token_id("</think>")
    lark = 'start: "so </think>" </think> /<think>\\/"</ <｜User｜> // <think>\n'
    found = forced(Grammar.of(tokenizer, "lark", lark, [1], SIZE), 1)
    at = found.index(end)
    assert tokenizer.decode(found[:at]) == "so </think>" and tokenizer.decode(found[at + 1 : -1]) == '<think>/"<'
    assert found[-1] == tokenizer.token_id("<｜User｜>")


def test_a_token_that_is_not_allowed_is_said_to_be_none_and_not_a_matter_of_cost() -> None:
    tokenizer = tokenizer_of("demo")
    grammar = Grammar.of(tokenizer, "regex", "[a-z]*", [tokenizer.eos or 0], tokenizer.size)
    with pytest.raises(UsageError, match="was not followed"):
        grammar.accept(tokenizer.encode_literal("7")[0])


def test_masks_of_drafts_end_where_they_cost_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("demo")
    drafts = tokenizer.encode_literal("abcdefgh")
    eos = [tokenizer.eos or 0]
    assert len(Grammar.of(tokenizer, "regex", "[a-z]*", eos, tokenizer.size).masks(drafts)) == len(drafts) + 1
    grammar = Grammar.of(tokenizer, "regex", "[a-z]*", eos, tokenizer.size)
    monkeypatch.setattr(module, "_EACH", 0.0)
    assert len(grammar.masks(drafts)) == 1, "all others would have cost more than is allowed"
    monkeypatch.setattr(module, "_BURST", -1.0)
    with pytest.raises(UsageError, match="too costly"):
        grammar.masks([])


def test_a_grammar_whose_first_mask_costs_too_much_is_refused_before_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("demo")
    monkeypatch.setattr(module, "_BURST", -1.0)
    with pytest.raises(UsageError, match="too costly"):
        Grammar.of(tokenizer, "regex", "[a-z]*", [tokenizer.eos or 0], tokenizer.size)
