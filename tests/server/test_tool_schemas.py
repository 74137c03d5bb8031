"""Tools whose parameters are no schema, where V3.2's markup is made from them: the client's fault, and said so."""

from typing import Any

import pytest

from dsv3.server.errors import ApiError
from dsv3.server.grammars import _markup

WRONG: list[dict[str, Any]] = [
    {"properties": ["a"]}, {"properties": 5}, {"properties": "abc"}, {"required": 5}, {"required": [{"x": 1}]},
    {"required": "a"},
    {"properties": {"a": {"type": [["x"]]}}}, {"properties": {"a": {"type": 5}}}, {"properties": {"a": {"enum": 5}}},
    {"properties": {"a": {"enum": "abc"}}}, {"properties": {"a": {"minLength": "x"}}}, {"properties": {"a": {"maxLength": -1}}},
]  # fmt: skip


@pytest.mark.parametrize("parameters", WRONG, ids=str)
def test_what_is_no_schema_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        _markup("<[3]>", [{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert caught.value.status == 400 and "'f'" in str(caught.value.body())
