"""Parameters of tools of which one must be called: what cannot be followed is the client's fault, and said so; what can, is."""

from typing import Any

import pytest

from dsv3.engine.chat import ChatFormat
from dsv3.engine.grammar import Grammar
from dsv3.server.errors import ApiError
from dsv3.server.grammars import after_reasoning, call_grammar
from tests.support.tokenizers import v32_tokenizer

M = "｜DSML｜"
FORMATS = ["deepseek_v3", "deepseek_v31", "deepseek_v32"]
WRONG: list[dict[str, Any]] = [
    {"properties": ["a"]}, {"properties": 5}, {"properties": "abc"}, {"required": 5}, {"required": [{"x": 1}]},
    {"required": "a"}, {"type": "string"}, {"type": ["string", "null"]}, {"type": "nope"},
    {"properties": {"a": {"type": [["x"]]}}}, {"properties": {"a": {"type": 5}}}, {"properties": {"a": {"enum": 5}}},
    {"properties": {"a": {"enum": "abc"}}}, {"properties": {"a": {"minLength": "x"}}}, {"properties": {"a": {"maxLength": -1}}},
    {"properties": {"a": {"type": "nope"}}, "required": ["a"]}, {"properties": {"a": {"enum": []}}, "required": ["a"]},
    {"properties": {"a": False}, "required": ["a"]}, {"required": ["a"], "additionalProperties": False},
    {"properties": {"a": {"$ref": "#/$defs/b"}}}, {"$ref": "#/$defs/b"},
    {"properties": {"a": {"pattern": "(", "type": "string"}}},
    {"properties": {"a": {"type": "string", "format": "no such"}}, "required": ["a"]}, {"not": {}},
]  # fmt: skip
REFERENCE = {"$ref": "#/$defs/p", "$defs": {"p": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}}
UNNAMEABLE = ['a"b', "a\nb", "a<b", "a>b", "", "n" * 201]
ONLY_MARKUP: list[dict[str, Any]] = [
    {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"allOf": [{"properties": {"a": {}}}]}, {"minProperties": 1},
    {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "integer"}}},
    *({"properties": {name: {"type": "integer"}}} for name in UNNAMEABLE),
]  # fmt: skip


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def grammar(form: str, parameters: dict[str, Any]) -> tuple[str, str]:
    return call_grammar(ChatFormat.of(v32_tokenizer(), form), v32_tokenizer(), [tool(parameters)])


def refused(form: str, parameters: dict[str, Any]) -> str:
    with pytest.raises(ApiError) as caught:
        grammar(form, parameters)
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and "'f'" in error["message"] and error["param"] == "tools"
    assert "start:" not in error["message"], "the grammar that dsv3 made is not the client's"
    return str(error["message"])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("parameters", WRONG, ids=str)
def test_what_is_no_schema_of_an_object_is_refused(form: str, parameters: dict[str, Any]) -> None:
    refused(form, parameters)


@pytest.mark.parametrize("parameters", ONLY_MARKUP, ids=str)
def test_what_markup_cannot_say_is_refused_and_followed_where_arguments_are_json(parameters: dict[str, Any]) -> None:
    assert "tool_choice: auto" in refused("deepseek_v32", parameters)
    for form in ("deepseek_v3", "deepseek_v31"):
        kind, text = grammar(form, parameters)
        assert Grammar.of(v32_tokenizer(), kind, text, [1], 129280).masks([])


def allows(form: str, parameters: dict[str, Any], arguments: str, reasoning: str | None = None) -> bool:
    """Whether a call may have these arguments, as this format writes them."""
    tokenizer = v32_tokenizer()
    around = {
        "deepseek_v3": ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n", "\n```"),
        "deepseek_v31": ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>", ""),
        "deepseek_v32": (f'<{M}function_calls>\n<{M}invoke name="f">\n', f"</{M}invoke>\n</{M}function_calls>"),
    }[form]
    end = "" if form == "deepseek_v32" else "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    made = grammar(form, parameters)
    if reasoning is not None:
        made = after_reasoning(made, tokenizer)
    matcher = Grammar.of(tokenizer, *made, [1], 129280)
    for token in tokenizer.encode_plain((reasoning or "") + around[0] + arguments + around[1] + end):
        if not bool(matcher.masks([])[0][token]):
            return False
        matcher.accept(token)
    return bool(matcher.finished or matcher.masks([])[0][1])


def line(name: str, text: str, string: bool = False) -> str:
    return f'<{M}parameter name="{name}" string="{str(string).lower()}">{text}</{M}parameter>\n'


@pytest.mark.parametrize("reasoning", [None, "hm, so</think>"])
@pytest.mark.parametrize("form", FORMATS)
def test_white_space_between_the_parts_of_arguments_has_an_end(form: str, reasoning: str | None) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
    for spaces, wanted in ((0, True), (1, True), (16, True), (17, False), (400, False)):
        array = f"[1,{' ' * spaces}2]"
        arguments = line("a", array) if form == "deepseek_v32" else f'{{"a": {array}}}'
        assert allows(form, parameters, arguments, reasoning) is wanted, spaces


@pytest.mark.parametrize(
    ("parameters", "arguments", "wanted"),
    [
        (REFERENCE, line("a", "1"), True), (REFERENCE, "", False),
        ({"properties": {"a": True}}, line("a", "[1]"), True), ({"properties": {"a": False}}, line("a", "1"), False),
        ({"properties": {"a": False}}, "", True),
        ({"additionalProperties": False}, "", True), ({"additionalProperties": False}, line("a", "x", True), False),
        ({"additionalProperties": {"type": "integer"}}, line("any thing", "1") + line("b", "2"), True),
        ({"additionalProperties": {"type": "integer"}}, line("a", "x", True), False),
        ({}, line("a", "[1]") + line("b", "x", True), True), ({}, line("n" * 201, "[1]"), False),
        ({"properties": {"n" * 200: {}}, "required": ["n" * 200]}, line("n" * 200, "[1]"), True),
        ({"properties": {"a": {"enum": [f"</{M}parameter>", "<think>"]}}}, line("a", "<think>", True), False),
        ({"required": ["b"], "additionalProperties": {"type": "integer"}}, line("b", "x", True), False),
        ({"required": ["b"], "additionalProperties": {"type": "integer"}}, line("b", "3"), True),
        ({"properties": {"ä b/c": {"const": "x"}}}, line("ä b/c", "x", True), True),
        ({"properties": {"a": {"type": "string", "enum": ["x", 'say "y"']}}}, line("a", 'say "y"', True), True),
    ],
)  # fmt: skip
def test_markup_keeps_to_the_schema(parameters: dict[str, Any], arguments: str, wanted: bool) -> None:
    assert allows("deepseek_v32", parameters, arguments) is wanted
