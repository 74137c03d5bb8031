"""Generated tokens taken apart where calls are written as DeepSeek-V3.2 writes them: in tags, a parameter at a time."""

from __future__ import annotations

import json
import re
from enum import Enum

from dsv3.engine.split import Event, Marker, Splitter, State
from dsv3.engine.text import Tokenizer

DSML = "｜DSML｜"  # a token of its own; `<` or `</` stands before it, a tag's name and attributes after it, then `>`

_TAG = re.compile(
    r'(?P<calls>function_calls)>|invoke name="(?P<call>[^"\n]*)">'
    r'|parameter name="(?P<name>[^"\n]*)" string="(?P<string>true|false)">'
)
_END = re.compile(r"(function_calls|invoke|parameter)>")
_QUOTED = re.compile(r'"[^"]*(?:"|\Z)')  # a name may hold ">"
_LONGEST = 1024  # characters of a tag; what is longer is text
_BEFORE, _BEFORE_END = re.compile(r"\n{0,2}(?:</?)?\Z"), re.compile(r"(?:</?)?\Z")  # what a tag that may follow takes along


class _Place(Enum):
    OUTSIDE = "text"
    CALLS = "among calls, outside of one"
    CALL = "in a call, outside of a parameter"
    VALUE = "a parameter's value"


class MarkupSplitter(Splitter):
    """As `Splitter`, for calls like this, where every `｜DSML｜` is one token:

        <｜DSML｜function_calls>
        <｜DSML｜invoke name="weather">
        <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
        <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
        </｜DSML｜invoke>
        </｜DSML｜function_calls>

    Arguments come as the JSON object that they are to OpenAI's clients, a piece for every token: values of string="true" as
    JSON strings, others as they are written. Tags that mean nothing where they stand are text, as is the marker by itself.
    """

    def __init__(self, tokenizer: Tokenizer, reasoning: bool = False) -> None:
        super().__init__(tokenizer, None, reasoning)
        self._marker = tokenizer.token_id(DSML)
        self._place = _Place.OUTSIDE
        self._before = ""  # held back: the beginning of a tag, if the marker follows
        self._tag: str | None = None  # a tag's text after the marker, until it is whole
        self._string = False
        self._parameters = 0

    def push(self, token: int, text: str | None = None) -> list[Event]:
        if token != self._marker:
            return super().push(token, text)
        events = self._flush()
        if self._tag is not None or not self._before.endswith(("<", "</")):
            return events + self._text(DSML)
        self._tag = ""
        return events

    @property
    def opening(self) -> frozenset[int]:
        return frozenset() if self._marker is None else frozenset((self._marker,))

    def finish(self, cut: bool = False) -> list[Event]:
        events = self._flush()
        if cut and self._tag is not None:
            self._before, self._tag = "", None
        events += self._give_up()
        self._place = _Place.OUTSIDE
        return events + super().finish(cut)

    def _enter(self, marker: Marker) -> list[Event]:
        events = self._give_up()
        return events + super()._enter(marker)

    def _means(self, marker: Marker) -> bool:
        return self._place is _Place.OUTSIDE and super()._means(marker)

    def _text(self, piece: str) -> list[Event]:
        if not piece:
            return []
        if self._tag is not None:
            self._tag += piece
            return self._within_tag(piece)
        text = self._before + piece
        kept = (_BEFORE_END if self._place is _Place.VALUE else _BEFORE).search(text)
        assert kept is not None  # it matches nothing, at least
        self._before = kept.group()
        return self._say(text[: kept.start()])

    def _give_up(self) -> list[Event]:
        """What was held back is text: no tag came of it."""
        held = self._before + (DSML + self._tag if self._tag is not None else "")
        self._before, self._tag = "", None
        return self._say(held)

    def _within_tag(self, piece: str) -> list[Event]:
        assert self._tag is not None
        closing = self._before.endswith("</")
        tag = (_END if closing else _TAG).match(self._tag) if ">" in piece else None
        if tag is None:
            ended = ">" in piece and ">" in _QUOTED.sub("", self._tag)
            hopeless = ended or "\n" in piece or len(self._tag) > _LONGEST
            return self._give_up() if hopeless else []
        events = self._closed(tag[1]) if closing else self._opened(tag)
        if events is None:
            return self._give_up()
        rest = self._tag[tag.end() :]
        self._before, self._tag = "", None
        return events + self._text(rest)

    def _opened(self, tag: re.Match[str]) -> list[Event] | None:
        """What a tag that opens something means here; None: nothing."""
        if tag["calls"]:
            if self._place is not _Place.OUTSIDE:
                return None
            self._place, self._state, self._blank = _Place.CALLS, State.CONTENT, False
            return []
        if tag["call"] is not None:
            events = self._closed("invoke") or []
            self._place, self._state, self._blank = _Place.CALL, State.CONTENT, False
            self._parameters = 0
            self._calls += 1
            return [*events, Event("call", tag["call"], self._calls - 1)]
        if self._place is not _Place.CALL:
            return None
        self._place, self._string = _Place.VALUE, tag["string"] == "true"
        self._parameters += 1
        before, quote = "{" if self._parameters == 1 else ", ", '"' if self._string else ""
        return self._argument(f"{before}{json.dumps(tag['name'], ensure_ascii=False)}: {quote}")

    def _closed(self, what: str) -> list[Event] | None:
        """What a tag that closes something means here, and everything within it; None: nothing."""
        within = self._place in (_Place.CALL, _Place.VALUE)
        if what == "parameter":
            if self._place is not _Place.VALUE:
                return None
            self._place = _Place.CALL
            return self._argument('"') if self._string else []
        if what == "invoke":
            if not within:
                return None
            events = self._closed("parameter") or []
            self._place = _Place.CALLS
            return events + self._argument("}" if self._parameters else "{}")
        if self._place is _Place.OUTSIDE:
            return None
        events = self._closed("invoke") or []
        self._place = _Place.OUTSIDE
        return events

    def _argument(self, text: str) -> list[Event]:
        return [Event("arguments", text, self._calls - 1)] if text else []

    def _say(self, text: str) -> list[Event]:
        """Text in its place; white space between tags is none."""
        if self._place is _Place.VALUE:
            return self._argument(json.dumps(text, ensure_ascii=False)[1:-1] if self._string else text)
        if self._place is _Place.OUTSIDE:
            return super()._text(text)
        return [Event("content", text)] if text.strip() else []
