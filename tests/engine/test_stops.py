"""Stop strings: what was shown, token by token, is what the result says, and calls of tools are no text to them."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3.engine.options import check_options
from dsv3.engine.request import Request
from tests.support.tokenizers import deepseek_tokenizer, tokenizer_of, v32_tokenizer

NAMES = st.sampled_from(["demo", "deepseek"])


def asked(stop: list[str], limit: int, name: str = "deepseek", stopless: frozenset[int] = frozenset()) -> Request:
    options = check_options(stop=stop, logprobs=0)
    return Request([0], options, 0, limit, frozenset((1,)), tokenizer_of(name), stopless=stopless)


def told(request: Request, ids: list[int]) -> list[tuple[int, str]]:
    found = []
    for token in ids:
        request.append(token, (-float(token), []))
        found += request.take_events()
        if request.done:
            break
    return found


@settings(max_examples=300, deadline=None)
@given(NAMES, st.text(st.sampled_from("aé🤖 \n京x"), min_size=1, max_size=12), st.data())
@example("deepseek", "🤖", None)
def test_events_tokens_and_log_probabilities_agree_wherever_a_text_is_ended(
    name: str, text: str, data: st.DataObject | None
) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode_literal(f"{text} and {text}")
    stop, limit = ["🤖"], len(ids)
    if data is not None:
        begin = data.draw(st.integers(0, len(text) - 1))
        stop = [text[begin : begin + data.draw(st.integers(1, 3))], "nd"][: data.draw(st.integers(0, 2))]
        limit = data.draw(st.integers(1, len(ids)))
        silent = data.draw(st.lists(st.integers(0, len(ids)), max_size=2))
        for at in silent:
            ids.insert(at, 0)
    request = asked(stop, limit, name)
    events = told(request, ids)
    result = request.result()
    assert [token for token, _ in events if token >= 0] == result.ids
    assert "".join(piece for _, piece in events) == result.text
    assert [value for value, _ in result.logprobs or []] == [-float(token) for token in result.ids]
    assert not any(s in result.text for s in stop)


def test_a_token_without_text_waits_while_a_stop_string_may_take_it_back() -> None:
    tokenizer = deepseek_tokenizer()
    ids = tokenizer.encode_literal("a🦄")
    assert len(ids) > 2, "one character of several tokens"
    request = asked(["🦄"], 100)
    assert told(request, ids) == [(ids[0], "a")]
    assert request.result().ids == ids[:1]


def test_in_a_call_a_stop_string_is_no_stop() -> None:
    tokenizer = v32_tokenizer()
    marker = tokenizer.token_id("<｜tool▁calls▁begin｜>")
    assert marker is not None
    before, within = tokenizer.encode_literal("so STO"), tokenizer.encode_literal('{"a": "STOP"}')
    request = asked(["STOP", "}"], 100, stopless=frozenset((marker,)))
    events = told(request, [*before, marker, *within, 1])
    assert [token for token, _ in events] == [*before, marker, *within], "what might have become one before it is shown"
    assert request.finish_reason == "stop" and request.result().text.endswith('{"a": "STOP"}')
    request = asked(["STOP"], 100, stopless=frozenset((marker,)))
    told(request, [*before, *tokenizer.encode_literal("P"), marker])
    assert request.result().text == "so "


def test_the_end_of_reasoning_is_no_text_to_a_stop_string() -> None:
    tokenizer = v32_tokenizer()
    end = tokenizer.token_id("</think>")
    assert end is not None
    before, after = tokenizer.encode_literal("so <"), tokenizer.encode_literal("is it > no")
    request = asked(["<<", "think", ">"], 100)
    request.unsearched = frozenset((end,))
    events = told(request, [*before, end, *after])
    assert "".join(text for _, text in events) == request.result().text
    assert request.result().text == "so <</think>is it ", "what follows is searched again"
    assert request.finish_reason == "stop" and [token for token, _ in events] == request.result().ids
