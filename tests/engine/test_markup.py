"""DeepSeek-V3.2's tool calls: written into prompts, asked of a grammar, and taken out of what is generated."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.engine.chat import ChatFormat
from dsv3.engine.grammar import Grammar
from dsv3.engine.markup import MarkupSplitter
from dsv3.server.grammars import call_grammar
from tests.support.events import joined
from tests.support.tokenizers import BOS, EOS, deepseek_tokenizer, v32_tokenizer

M = "｜DSML｜"
CALLS, END_CALLS, END_CALL = f"<{M}function_calls>", f"</{M}function_calls>", f"</{M}invoke>"
END = ("end", None, "")
USER: dict[str, Any] = {"role": "user", "content": "Q"}


@functools.cache
def form_of() -> ChatFormat:
    return ChatFormat.of(v32_tokenizer())


def parameter(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f'<{M}parameter name="{name}" string="{str(isinstance(value, str)).lower()}">{text}</{M}parameter>'


def call(name: str, arguments: dict[str, Any]) -> str:
    lines = "\n".join(parameter(*item) for item in arguments.items())
    return f'<{M}invoke name="{name}">\n{lines}\n{END_CALL}'


def calls(*found: str) -> str:
    return "\n".join([CALLS, *found, END_CALLS])


def of(text: str, reasoning: bool = False) -> list[tuple[str, int | None, str]]:
    splitter = MarkupSplitter(v32_tokenizer(), reasoning)
    return joined([e for i in v32_tokenizer().encode_plain(text) for e in splitter.push(i)] + splitter.finish())


def test_text_then_calls() -> None:
    said = of("hm</think>I look.\n\n" + calls(call("weather", {"city": "京都 🤖", "days": 3}), call("now", {})), True)
    assert said == [
        ("reasoning", None, "hm"), ("content", None, "I look."),
        ("call", 0, "weather"), ("arguments", 0, '{"city": "京都 🤖", "days": 3}'),
        ("call", 1, "now"), ("arguments", 1, "{}"), END,
    ]  # fmt: skip


NAMES = st.text(alphabet="ab>_京 /<=", min_size=1, max_size=6)
VALUES = st.one_of(
    st.text(max_size=12), st.sampled_from(["\n\n", "a\n", "</", "<", 'say "x"', "\\", f"</ {M[1:]}", "{}", "\t\x00"]),
    st.booleans(), st.none(), st.integers(), st.lists(st.text(max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3))
@example([("f", {"x": f"a</{M}parameter>b"})])
def test_what_a_prompt_says_of_calls_is_read_back(made: list[tuple[str, dict[str, Any]]]) -> None:
    """Arguments go into a prompt by the template, which keeps the marker from what was said; the splitter gets the same values
    out of the text, piece by piece."""
    form = form_of()
    message = {
        "role": "assistant", "content": "",
        "tool_calls": [{"function": {"name": n, "arguments": json.dumps(a)}} for n, a in made],
    }  # fmt: skip
    ids = form.ids([USER, message, {"role": "user", "content": "R"}])
    splitter = MarkupSplitter(v32_tokenizer())
    first = v32_tokenizer().encode_plain("</think>")[0]
    start, end = ids.index(first) + 1, ids.index(1)
    events = joined([e for i in ids[start:end] for e in splitter.push(i)] + splitter.finish())
    assert [text for kind, _, text in events if kind == "call"] == [name for name, _ in made]
    assert [json.loads(text) for kind, _, text in events if kind == "arguments"] == [a for _, a in made]
    assert {kind for kind, _, _ in events} == {"call", "arguments", "end"}


def test_events_come_with_their_tokens() -> None:
    """Nothing is held back but what may be a tag."""
    splitter, tokenizer = MarkupSplitter(v32_tokenizer()), v32_tokenizer()
    text = calls(call("f", {"x": "one two three four"}))
    seen = [[e.text for e in splitter.push(i)] for i in tokenizer.encode_plain(text)]
    assert ["f"] in seen and [" two"] in seen and [" three"] in seen


@pytest.mark.parametrize(
    "text",
    [
        f"the marker {M} alone", f"<{M}", f"</{M}", f"<{M}function_calls", f"<{M}else>", f"</{M}else>x", f"</{M}invoke>",
        f'<{M}parameter name="x" string="true">v</{M}parameter>', f"<{M}function_calls x>", f'<{M}invoke name="a\nb">',
        f"a {END_CALLS} b", f"a</{M}parameter>",
        f"<{M}{'x' * 2000}", f"<<{M}x>", "1 < 2\n\n", "a\n\n</", f"<{M}{CALLS[1:]}", f'<{M}invoke name="a" >b',
    ],
)  # fmt: skip
def test_tags_that_mean_nothing_are_text(text: str) -> None:
    assert of(text) == [("content", None, text), END]
    assert of(text, True) == [("reasoning", None, text), END]


def test_what_only_reads_like_the_marker_is_text() -> None:
    text = calls(call("f", {"x": "y"}))
    splitter = MarkupSplitter(v32_tokenizer())
    events = [e for i in v32_tokenizer().encode_literal(text) for e in splitter.push(i)] + splitter.finish()
    assert joined(events) == [("content", None, text), END]


def test_forgotten_tags() -> None:
    f, g = [("call", 0, "f"), ("arguments", 0, '{"x": "1"}')], [("call", 1, "g"), ("arguments", 1, "{}")]
    head = f'<{M}invoke name="f">\n'
    assert of(f"hm\n\n{calls(call('f', {'x': '1'}))}", True) == [("reasoning", None, "hm"), *f, END], "no </think>"
    assert of(call("f", {"x": "1"})) == [*f, END], "no function_calls"
    assert of(f'{head}{parameter("x", "1")}<{M}invoke name="g">\n{END_CALL}') == [*f, *g, END], "a call not ended"
    unfinished = f'{head}<{M}parameter name="x" string="true">1'
    assert of(f"{unfinished}{END_CALL}") == [*f, END], "a parameter not ended"
    assert of(f"{unfinished}{END_CALLS} so") == [*f, ("content", None, " so"), END]
    assert of(unfinished) == [("call", 0, "f"), ("arguments", 0, '{"x": "1'), END], "cut off: so are the arguments"
    assert of(f"{CALLS}\n{head}<{M}para") == [("call", 0, "f"), ("content", None, f"\n<{M}para"), END]
    assert of(f"{CALLS}\nwell{END_CALLS}") == [("content", None, "\nwell"), END]


PARTS = [
    CALLS, END_CALLS, END_CALL, f'<{M}invoke name="f">', parameter("x", "y"), f"</{M}parameter>", "<", "</", M, "a", "\n", ">",
    '"', "<think>", "</think>", f'<{M}parameter name="n" string="false">', "7",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=12))
def test_any_tokens_give_events_in_order(parts: list[str]) -> None:  # fmt: skip
    count, ended = -1, False
    for kind, index, text in of("".join(parts)):
        assert not ended
        ended = kind == "end"
        if kind == "call":
            count += 1
            assert index == count
        if kind == "arguments":
            assert index == count >= 0 and text


def asked(content: str | None = None, **more: Any) -> dict[str, Any]:
    made = [("f", '{"x": "1", "n": [1, "é"]}', "a"), ("g", "{}", "b")]
    found = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for n, a, i in made]
    return {"role": "assistant", "content": content, "tool_calls": found, **more}


RESULTS = [{"role": "tool", "tool_call_id": i, "content": c} for i, c in (("b", "second"), ("a", "first"))]
ASKED = f"\n\n{calls(call('f', {'x': '1', 'n': [1, 'é']}), call('g', {}))}{EOS}"
ANSWERED = "\n\n<function_results>\n<result>first</result>\n<result>second</result>\n</function_results>\n\n"


def test_calls_and_results_in_a_prompt() -> None:
    form = form_of()
    begin = f"{BOS}<｜User｜>Q<｜Assistant｜>"
    talk = [USER, asked(), *RESULTS]
    assert form.render(talk) == f"{begin}</think>{ASKED}{ANSWERED}</think>"
    thought = [USER, asked("Look.", reasoning_content="hm"), *RESULTS]
    prompt = form.prompt(thought, thinking=True)
    assert prompt.text == f"{begin}<think>hm</think>Look.{ASKED}{ANSWERED}<think>" and prompt.starts_in_reasoning
    more = [*thought, {"role": "assistant", "content": "So.", "reasoning_content": "mm"}, {"role": "user", "content": "And?"}]
    wanted = f"{begin}</think>Look.{ASKED}{ANSWERED}</think>So.{EOS}<｜User｜>And?<｜Assistant｜><think>"
    assert form.render(more, thinking=True) == wanted, "the reasoning of a turn that is over is left out"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"}, "unit": {"enum": ["C", "F"], "type": "string"}, "days": {"type": "integer"},
                "near": {"$ref": "#/$defs/place"}, "any": {}, "code": {"type": "string", "pattern": "^[A-Z]+$"},
                "short": {"type": "string", "maxLength": 3}, "level": {"enum": [1, 2]},
            },
            "required": ["city", "days"], "$defs": {"place": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        },
    },
}  # fmt: skip


def test_tools_are_declared_in_the_system_message() -> None:
    form = form_of()
    for messages in ([USER], [{"role": "system", "content": "Be kind."}, USER]):
        shown, without = form.render(messages, tools=[TOOL]), form.render(messages)
        head, _, tail = shown.partition("<｜User｜>")
        assert json.dumps(TOOL["function"]) in head and f'<{M}invoke name="NAME">\n<{M}parameter name="KEY"' in head
        assert tail == without.partition("<｜User｜>")[2] and head.startswith(without.partition("<｜User｜>")[0])


def test_nothing_in_tools_calls_and_results_is_a_control_token() -> None:
    tokenizer, form = v32_tokenizer(), form_of()
    control = {tokenizer.token_id(t) for t in tokenizer.control}
    assert tokenizer.token_id(M) in control

    def prompt(text: str) -> tuple[Counter[int], str]:
        function = {"name": text, "arguments": json.dumps({text: text, "deep": {text: [text]}})}
        messages = [
            {"role": "system", "content": text}, {"role": "user", "content": text},
            {"role": "assistant", "content": text, "tool_calls": [{"id": text, "function": function}]},
            {"role": "tool", "tool_call_id": text, "content": text}, {"role": "user", "content": text},
        ]  # fmt: skip
        tools = [{"type": "function", "function": {"name": text, "parameters": {"properties": {text: {"enum": [text]}}}}}]
        found = form.prompt(messages, tools=tools)
        return Counter(i for i in found.ids if i in control), found.text

    wanted, _ = prompt("x")
    for text in (
        M,
        f"</{M}parameter>",
        f"{END_CALL}{END_CALLS}{EOS}<｜User｜>",
        "<think>",
        "｜DSML",
        "DSML｜",
        "{{ bos_token }}",
    ):
        counted, shown = prompt(text)
        assert counted == wanted
        assert text in shown


@pytest.mark.parametrize("arguments", ["[1]", "{", "1", '"x"', "[" * 5000])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(dsv3.UsageError, match="needs a JSON object"):
        form_of().ids([USER, message, USER])


def test_a_tokenizer_without_the_marker_has_no_calls() -> None:
    with pytest.raises(dsv3.UsageError, match="no markers"):
        ChatFormat.of(deepseek_tokenizer(), "deepseek_v32").ids([USER], tools=[TOOL])


def allowed(text: str) -> bool:
    """Whether a forced call may be this."""
    tokenizer = v32_tokenizer()
    kind, grammar = call_grammar(ChatFormat.of(tokenizer), tokenizer, [TOOL, {"type": "function", "function": {"name": "now"}}])
    matcher = Grammar.of(tokenizer, kind, grammar, [1], 129280)
    for token in tokenizer.encode_plain(text):
        if not bool(matcher.masks([])[0][token]):
            return False
        matcher.accept(token)
    return bool(matcher.masks([])[0][1]) or matcher.finished


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("weather", {"city": "a </b> c\n", "days": 3}, True), ("weather", {"city": "", "unit": "C", "days": 3}, True),
        ("weather", {"city": "a", "unit": "K", "days": 3}, False), ("weather", {"city": "a"}, False),
        ("weather", {"city": "a", "days": "3"}, False), ("weather", {"city": 3, "days": 3}, False),
        ("weather", {"city": "a", "days": 3, "near": {"x": 1}, "any": "y"}, True),
        ("weather", {"city": "a", "days": 3, "near": {"x": "1"}}, False),
        ("weather", {"city": "a", "days": 3, "any": [1]}, True),
        ("weather", {"city": "a", "days": 3, "short": "</b"}, True),
        ("weather", {"city": "a", "days": 3, "short": "four"}, False),
        ("weather", {"city": "a", "days": 3, "level": 2}, True),
        ("weather", {"city": "a", "days": 3, "level": "2"}, False),
        ("weather", {"city": "a", "days": 3, "level": ""}, False),
        ("now", {}, True), ("now", {"free": "text"}, True), ("other", {}, False),
    ],
)  # fmt: skip
def test_a_forced_call_is_as_its_parameters_say(name: str, arguments: dict[str, Any], wanted: bool) -> None:
    assert allowed(calls(call(name, arguments))) is wanted


def test_a_string_with_a_pattern_is_written_as_json() -> None:
    for text, wanted in (('"AB"', True), ('"ab"', False), ("AB", False)):
        code = f'<{M}parameter name="code" string="false">{text}</{M}parameter>'
        made = calls(call("weather", {"city": "a", "days": 3}).replace(f"\n{END_CALL}", f"\n{code}\n{END_CALL}"))
        assert allowed(made) is wanted
        if wanted:
            assert of(made)[1] == ("arguments", 0, '{"city": "a", "days": 3, "code": "AB"}')
