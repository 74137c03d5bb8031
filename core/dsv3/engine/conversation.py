"""Conversations as they come from outside, in OpenAI's form, checked and brought to one form for templates."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dsv3.errors import UsageError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def messages_of(messages: Any) -> list[dict[str, Any]]:
    """The messages with: role (system, user, assistant, tool), content (one str), an assistant's tool_calls (absent, or some
    {"id", "type": "function", "function": {"name", "arguments": JSON text}}) and reasoning_content, a tool's tool_call_id.

    A run of tool results is put into the order of the calls that it answers, as DeepSeek's formats have no ids. Unknown fields
    are left out. UsageError for anything else.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise UsageError(f'{_shown(messages)} is no list of {{"role": ..., "content": ...}} messages')
    found = [_message(message, f"message {at}") for at, message in enumerate(messages)]
    if not found:
        raise UsageError('there are no messages; give at least one {"role": "user", "content": ...}')
    return _in_order(found)


def tools_of(tools: Any) -> list[dict[str, Any]]:
    """OpenAI's function tools, checked: {"type": "function", "function": {"name", "description", "parameters", ...}}."""
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise UsageError(f"tools is {_shown(tools)}; expected a list of function tools")
    found = []
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name.strip():
            raise UsageError(f'tool {at} is {_shown(tool)}; expected {{"type": "function", "function": {{"name": ...}}}}')
        found.append({"type": "function", "function": dict(function)})
    return found


def arguments_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, read. UsageError unless they are a JSON object."""
    try:
        found = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        said = f"arguments of {_shown(function['name'])} are {_shown(function['arguments'])}"
        raise UsageError(f"{said}; this model's chat format needs a JSON object")
    return found


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(f'{where} is {_shown(message)}; expected {{"role": ..., "content": ...}}')
    role = _ROLES.get(message["role"])
    if role is None:
        raise UsageError(f"{where}: role must be {', '.join(_ROLES)}; found {_shown(message['role'])}")
    found: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls:
        found["tool_calls"] = _calls(calls, where)
    content = message.get("content")
    found["content"] = "" if content is None and calls else _content(content, where)
    for name, owner in (("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        value = message.get(name) if role == owner else None
        if value is not None:
            found[name] = _string(value, f"{where}: {name}")
    return found


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise UsageError(f'{where}: content is {_shown(content)}; expected text, or a list of {{"type": "text", "text": ...}}')
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UsageError(f"{where}: content has the part {_shown(part)}; this model reads parts of type 'text' only")
    return "".join(_string(part.get("text"), f"{where}: text") for part in content)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise UsageError(f"{where}: tool_calls is {_shown(calls)}; expected a list")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise UsageError(f'{where}: tool call {_shown(call)}; expected {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(dict(arguments), ensure_ascii=False)
        name = _string(function.get("name"), f"{where}: name of a tool call")
        arguments = _string(arguments, f"{where}: arguments of {name}")
        call_id = _string(call.get("id") or "", f"{where}: id of a tool call")
        found.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return found


def _in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for is_tool, run in itertools.groupby(messages, key=lambda m: m["role"] == "tool"):
        group = list(run)
        if is_tool:
            group = _ordered(group, [c["id"] for c in found[-1].get("tool_calls", [])] if found else [])
        found += group
    return found


def _ordered(answers: list[dict[str, Any]], calls: list[str]) -> list[dict[str, Any]]:
    """Tool messages in the order of the calls with these ids. Where there are ids, each call has one answer: a model that knows
    answers by their order would take one for another's."""
    if len(answers) > len(calls):
        raise UsageError(f"{len(answers)} tool messages follow {len(calls)} tool calls; a tool message answers one call")
    ids = [m["tool_call_id"] for m in answers if "tool_call_id" in m]
    unknown = [i for i in ids if i not in calls]
    if any(calls) and unknown:
        raise UsageError(f"tool_call_id {_shown(unknown[0])} is none of the calls before it: {_shown(calls)}")
    if len(ids) < len(answers) or not all(calls):
        return answers
    if twice := Counter(ids) - Counter(calls):
        raise UsageError(f"tool call {_shown(next(iter(twice)))} is answered twice")
    if left := Counter(calls) - Counter(ids):
        raise UsageError(f"tool call {_shown(next(iter(left)))} is not answered; give it a tool message")
    return sorted(answers, key=lambda m: calls.index(m["tool_call_id"]))


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{what} is {_shown(value)}; expected text")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
