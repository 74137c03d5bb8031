"""Generated tokens taken apart: reasoning, text and calls, the same however tokens arrive, and no text lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.engine.chat import ChatFormat
from dsv3.engine.split import Event, Splitter, Syntax
from dsv3.engine.text import Tokenizer
from tests.support.events import joined
from tests.support.tokenizers import deepseek_tokenizer, demo_tokenizer, tokenizer_of

CALLS, CALL, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
END_CALL, END_CALLS = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
MARKERS = ["<think>", "</think>", CALLS, CALL, SEP, END_CALL, END_CALLS]
SYNTAXES: list[Syntax | None] = ["v3", "v3.1", None]


def split(tokenizer: Tokenizer, ids: list[int], syntax: Syntax | None, reasoning: bool = False) -> list[Event]:
    splitter = Splitter(tokenizer, syntax, reasoning)
    return [e for i in ids for e in splitter.push(i)] + splitter.finish()


def of(text: str, syntax: Syntax | None, reasoning: bool = False) -> list[tuple[str, int | None, str]]:
    tokenizer = deepseek_tokenizer()
    return joined(split(tokenizer, tokenizer.encode_plain(text), syntax, reasoning))


def v3(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{END_CALL}"


def v31(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{END_CALL}"


END = ("end", None, "")


def test_reasoning_then_text() -> None:
    assert of("hm\n</think>\n\nHi 🤖", None, True) == [("reasoning", None, "hm\n"), ("content", None, "\n\nHi 🤖"), END]
    assert of("<think>hm</think>Hi", "v3") == [("reasoning", None, "hm"), ("content", None, "Hi"), END]
    assert of("\n<think>\nhm", "v3") == [("content", None, "\n"), ("reasoning", None, "\nhm"), END]
    assert of("<think>\nhm", "v3", True) == [("reasoning", None, "\nhm"), END], "R1 may repeat what its prompt ended with"
    assert of("", None, True) == [END]


def test_a_marker_where_it_means_nothing_is_text() -> None:
    assert of("write <think> and </think>", "v3") == [("content", None, "write <think> and </think>"), END]
    assert of(f"a{SEP}b{END_CALL}{END_CALLS}c", "v3.1") == [("content", None, f"a{SEP}b{END_CALL}{END_CALLS}c"), END]
    assert of(f"a{CALLS}{v3('f', '{}')}", None) == [("content", None, f"a{CALLS}{v3('f', '{}')}"), END]
    wanted = [("call", 0, "f"), ("arguments", 0, f'{{"a": "<think>{SEP}"}}'), END]
    assert of(CALLS + v31("f", f'{{"a": "<think>{SEP}"}}') + END_CALLS, "v3.1") == wanted


def test_what_only_reads_like_a_marker_is_text() -> None:
    tokenizer = deepseek_tokenizer()
    text = f"a</think>{CALLS}{v3('f', '{}')}{END_CALLS}"
    assert joined(split(tokenizer, tokenizer.encode_literal(text), "v3", True)) == [("reasoning", None, text), END]


ARGUMENTS = ["{}", '{"x": "```"}', '{"x": "\\n```json\\n"}', '{"city": "京都 🤖", "n": [1, 2]}', '{\n  "a": 1\n}']


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize(("syntax", "write", "between"), [("v3", v3, "\n"), ("v3.1", v31, "")])
@pytest.mark.parametrize("before", ["", "I look.", "hm</think>I look.", "hm"])
def test_calls(arguments: str, syntax: Syntax, write: object, between: str, before: str) -> None:
    """Where </think> never comes, the calls end the reasoning."""
    assert callable(write)
    reasoning = before.startswith("hm")
    text = f"{before}{CALLS}{write('f', arguments)}{between}{write('get_weather', '{}')}{END_CALLS}"
    wanted: list[tuple[str, int | None, str]] = [("reasoning", None, "hm")] if reasoning else []
    wanted += [("content", None, "I look.")] if before.endswith("I look.") else []
    wanted += [("call", 0, "f"), ("arguments", 0, arguments), ("call", 1, "get_weather"), ("arguments", 1, "{}"), END]
    assert of(text, syntax, reasoning) == wanted
    json.loads(arguments)


def test_calls_that_are_not_quite_so() -> None:
    f = [("call", 0, "f"), ("arguments", 0, "{}")]
    assert of(v3("f", "{}"), "v3") == [*f, END], "the opening of all calls is forgotten"
    assert of(f"{CALLS}{CALL}f{SEP}{{}}{END_CALL}{END_CALLS}", "v3") == [*f, END], "V3.1's form in V3"
    assert of(f"{CALLS}{CALL}function{SEP}f\n{{}}{END_CALL}{END_CALLS}", "v3") == [*f, END], "no fence"
    assert of(f"{CALLS}{CALL}function{SEP}f{END_CALL}{END_CALLS}", "v3") == [("call", 0, "f"), END], "no arguments"
    assert of(v31("function", "{}"), "v3.1") == [("call", 0, "function"), ("arguments", 0, "{}"), END]
    fenced = f"{{}}\n```{END_CALL}{END_CALLS}"
    assert of(f"{CALL}f{SEP}{fenced}", "v3.1") == [("call", 0, "f"), ("arguments", 0, "{}\n```"), END], "V3.1 has no fence"
    assert of(f"{CALLS}{CALL}f{SEP}{{}}{CALL}g{SEP}1{END_CALLS}so", "v3.1") == [
        *f, ("call", 1, "g"), ("arguments", 1, "1"), ("content", None, "so"), END,
    ]  # fmt: skip
    among = f"{CALLS}{v31('f', '{}')}\n and\n{v31('g', '')}, so{END_CALLS}{END_CALLS}"
    assert of(among, "v3.1") == [
        *f, ("content", None, " and\n"), ("call", 1, "g"), ("content", None, f", so{END_CALLS}"), END,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cut", "wanted"),
    [
        (f"{CALL}func", [("content", None, "func")]), (f"{CALL}function{SEP}get_we", [("content", None, "get_we")]),
        (f"{CALL}function{SEP}f\n``", [("call", 0, "f"), ("arguments", 0, "``")]),
        (f"{CALL}function{SEP}f\n```json\n", [("call", 0, "f")]),
        (f"{CALL}function{SEP}f\n```json\n{{\n``", [("call", 0, "f"), ("arguments", 0, "{\n``")]),
        (f"{CALL}function{SEP}f\n```json\n{{}}\n```", [("call", 0, "f"), ("arguments", 0, "{}")]),
    ],
)  # fmt: skip
def test_an_output_that_is_cut_short_loses_nothing(cut: str, wanted: list[tuple[str, int | None, str]]) -> None:
    assert of(cut, "v3") == [*wanted, END]


def test_events_come_with_their_tokens() -> None:
    """Nothing waits but an unfinished character, a header, and what may be a fence."""
    tokenizer = deepseek_tokenizer()
    splitter = Splitter(tokenizer, "v3", True)
    wanted = '{"city": "Paris", "days": 3}'
    ids = tokenizer.encode_plain(f"one two</think>three four{CALLS}{v3('f', wanted)}{END_CALLS}")
    seen = [splitter.push(i) for i in ids]
    assert all(len(events) <= 2 for events in seen)
    arguments = [e.text for events in seen for e in events if e.kind == "arguments"]
    assert len(arguments) > 5 and "".join(arguments) == wanted
    assert [e.text for events in seen for e in events if e.kind == "reasoning"] == ["one", " two"]
    assert splitter.calls == 1


@st.composite
def streams(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    markers = [i for m in MARKERS if (i := tokenizer.token_id(m)) is not None]
    pieces = ["function", "f", "\n", "```json\n", "```", "\n```", "`", "{}", "{", " ", "text", "é🤖"]
    words = [tokenizer.encode_literal(p) for p in pieces]
    one = [st.integers(0, tokenizer.size + 3).map(lambda i: [i]), st.sampled_from(words)]
    if markers:
        one.append(st.sampled_from(markers).map(lambda i: [i]))
    return [i for part in draw(st.lists(st.one_of(*one), max_size=40)) for i in part]


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(["demo", "deepseek"]), st.sampled_from(SYNTAXES), st.booleans(), st.data())
def test_any_tokens_come_apart_without_loss(name: str, syntax: Syntax | None, reasoning: bool, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    ids = data.draw(streams(tokenizer))
    events = split(tokenizer, ids, syntax, reasoning)
    assert [e.kind for e in events].count("end") == 1 and events[-1].kind == "end"
    calls = [e.index for e in events if e.kind == "call"]
    assert calls == list(range(len(calls)))
    assert all(e.index is not None and e.index < len(calls) for e in events if e.kind == "arguments")
    order = [e.index for e in events if e.index is not None]
    assert all(a <= b for a, b in pairwise(order)), "a call is over when the next begins"
    # What is left out besides markers: white space, "function" and fences.
    marks = {tokenizer.token_id(m) for m in MARKERS}
    parts: list[list[int]] = [[]]
    for i in ids:
        parts[-1:] = [parts[-1], []] if i in marks else [[*parts[-1], i]]
    whole = "".join(tokenizer.decode(p) for p in parts)
    shown = "".join(e.text for e in events)
    for marker in MARKERS:
        shown = shown.replace(marker, "")
    rest = iter(whole)
    assert all(c in rest for c in shown), "in the order it had"
    for c in "`functionjson":
        whole, shown = whole.replace(c, ""), shown.replace(c, "")
    assert "".join(shown.split()) == "".join(whole.split())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SYNTAXES), st.booleans(), st.data())
def test_batches_of_tokens_give_the_same_events(syntax: Syntax | None, reasoning: bool, data: st.DataObject) -> None:
    """Accepted drafts come several at a time, and a Splitter is not told so."""
    tokenizer = deepseek_tokenizer()
    ids = data.draw(streams(tokenizer))
    whole = joined(split(tokenizer, ids, syntax, reasoning))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=len(ids), max_size=len(ids)))
    splitter, events, at = Splitter(tokenizer, syntax, reasoning), [], 0
    other = Splitter(tokenizer, syntax, not reasoning)  # streams share a tokenizer and nothing else
    for size in sizes:
        events += [e for i in ids[at : at + size] for e in splitter.push(i)]
        at += size
        other.push(size)
    assert joined(events + splitter.finish()) == whole


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_tokenizer_without_markers_gives_the_text(data: st.DataObject) -> None:
    tokenizer = demo_tokenizer()
    ids = data.draw(st.lists(st.integers(0, tokenizer.size), max_size=30))
    events = split(tokenizer, ids, "v3")
    assert "".join(e.text for e in events) == tokenizer.decode(ids)
    assert {e.kind for e in events} <= {"content", "end"}


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_r1", "deepseek_v31"])
def test_what_a_format_writes_its_splitter_reads(family: str) -> None:
    """An assistant's turn, rendered as history, comes apart into what it was."""
    form = ChatFormat.of(deepseek_tokenizer(), family)
    call = {"id": "", "type": "function", "function": {"name": "f", "arguments": '{"a": "x\\ny"}'}}
    asked = [{"role": "user", "content": "Q"}]
    answer = {"role": "assistant", "content": "Let me look.", "tool_calls": [call, call]}
    tokenizer = deepseek_tokenizer()
    text = form.render([*asked, answer, {"role": "user", "content": "Q"}])
    turn = text.split("<｜Assistant｜>")[1].removeprefix("</think>").split("<｜end▁of▁sentence｜>")[0]
    ids = tokenizer.encode_plain(turn)
    prompt = form.prompt(asked)
    assert prompt.starts_in_reasoning == (family == "deepseek_r1")
    splitter = form.splitter(prompt)
    events = joined([e for i in ids for e in splitter.push(i)] + splitter.finish())
    said = "reasoning" if prompt.starts_in_reasoning else "content"
    called = [(kind, n, text) for n in (0, 1) for kind, text in (("call", "f"), ("arguments", '{"a": "x\\ny"}'))]
    assert events == [(said, None, "Let me look."), *called, END]
