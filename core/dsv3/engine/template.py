"""Chat templates: jinja2 in a sandbox, with what templates of published models expect to find."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

from dsv3.errors import CheckpointError, UsageError


class Template:
    """A template that ships with dsv3 or lies in a model's folder; never one from a request. names: variables that it uses."""

    def __init__(self, source: str, own: bool) -> None:
        from jinja2 import TemplateSyntaxError, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self.names = frozenset(found.name for found in environment.parse(source).find_all(nodes.Name))
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            where = "the model's own" if own else "dsv3's"
            raise CheckpointError(
                f"chat template ({where}), line {error.lineno}: {error.message}; download the model's tokenizer files again"
            ) from error

    def render(self, **values: Any) -> str:
        """The prompt, ready for the assistant's turn. UsageError where the template refuses the values."""
        from jinja2 import TemplateError

        try:
            return self._template.render(add_generation_prompt=True, **values)
        # A template written for other messages trips over these in any of Python's ways.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as transformers gives it; jinja2's own would escape it for HTML."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # A guard's marks must stay findable.
    return re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", lambda found: json.dumps(found.group())[1:-1], text) if ensure_ascii else text
