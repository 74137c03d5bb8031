"""Generated tokens taken apart: reasoning, text, and tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from dsv3.engine.text import Detokenizer, Tokenizer

Kind = Literal["reasoning", "content", "call", "arguments", "end"]
Syntax = Literal["v3", "v3.1", "dsml"]

_OPEN, _CLOSE = "```json\n", "\n```"


@dataclass(frozen=True, slots=True)
class Event:
    """What a token added. text: the piece; of a "call" the function's name. index: which call, for "call" and "arguments"."""

    kind: Kind
    text: str = ""
    index: int | None = None


class Marker(Enum):
    THINK = "<think>"
    END_THINK = "</think>"
    CALLS = "<｜tool▁calls▁begin｜>"
    CALL = "<｜tool▁call▁begin｜>"
    SEP = "<｜tool▁sep｜>"
    END_CALL = "<｜tool▁call▁end｜>"
    END_CALLS = "<｜tool▁calls▁end｜>"


class State(Enum):
    REASONING = "before </think>"
    CONTENT = "text"
    BETWEEN = "among calls, outside of one"
    TYPE = "between a call's begin and its separator"
    NAME = "after V3's separator, before the end of the line"
    FENCE = "where V3's ```json is"
    ARGUMENTS = "JSON"


_IN_CALL = {State.TYPE, State.NAME, State.FENCE, State.ARGUMENTS}
_MEANS: dict[Marker, set[State]] = {
    Marker.END_THINK: {State.REASONING},
    # A model may forget </think>, and the opening of the calls.
    Marker.CALLS: {State.REASONING, State.CONTENT},
    Marker.CALL: set(State),
    Marker.SEP: {State.TYPE},
    Marker.END_CALL: _IN_CALL,
    Marker.END_CALLS: _IN_CALL | {State.BETWEEN},
}


class Splitter:
    """Token ids in, events out, each token at once and in constant time.

    syntax: what stands between the markers that begin and end a call. "v3" (V3, R1): "function", `<｜tool▁sep｜>`, the name,
    then the arguments in a ```json fence; "v3.1": the name, `<｜tool▁sep｜>`, the arguments; None: no calls. reasoning: the
    prompt ended within the reasoning.

    Markers are found by their ids; text that only looks like one is text, and so is a marker where it means nothing. Texts of
    events join to the decoded tokens without the markers, the white space between calls, and V3's "function" and fences. A
    tokenizer in which a marker is not one token does not have it.
    """

    def __init__(self, tokenizer: Tokenizer, syntax: Syntax | None = None, reasoning: bool = False) -> None:
        self._tokenizer = tokenizer
        self._v3 = syntax == "v3"
        thinking = (Marker.THINK, Marker.END_THINK)
        markers = [m for m in Marker if syntax or m in thinking]
        self._markers = {i: m for m in markers if (i := tokenizer.token_id(m.value)) is not None}
        self._state = State.REASONING if reasoning else State.CONTENT
        self._blank = True  # no text yet but white space
        self._detokenizer = Detokenizer(tokenizer)
        self._held: list[str] = []  # of a call's header, until it is whole
        self._tail = ""  # what may become V3's fence
        self._fenced = False
        self._calls = 0
        self._open = False  # the calls as a whole have begun and not ended

    @property
    def calls(self) -> int:
        """Tool calls begun so far."""
        return self._calls

    @property
    def thinking(self) -> frozenset[int]:
        """The tokens around reasoning."""
        return frozenset(i for i, marker in self._markers.items() if marker in (Marker.THINK, Marker.END_THINK))

    @property
    def opening(self) -> frozenset[int]:
        """The tokens with which calls may begin."""
        return frozenset(i for i, marker in self._markers.items() if marker in (Marker.CALLS, Marker.CALL))

    def push(self, token: int, text: str | None = None) -> list[Event]:
        """The events of one more token. text: what may be shown of it, from who decodes it himself."""
        marker = self._markers.get(token)
        if marker is None or not self._means(marker):
            return self._text(self._detokenizer.push(token) if text is None else text)
        events = self._flush()
        if self._state in _IN_CALL and marker is not Marker.SEP:
            events += self._close(marker in (Marker.END_CALL, Marker.END_CALLS))
        return events + self._enter(marker)

    def finish(self, cut: bool = False) -> list[Event]:
        """What was held back, then "end". cut: the text was ended by a limit. An unfinished header of a call is dropped then:
        it would have become none of the text. Without it becomes content: nothing is lost."""
        events = self._flush()
        if self._state in _IN_CALL:
            if cut and self._state in (State.TYPE, State.NAME):
                self._held = []
            events += self._close(False)
        self._state = State.CONTENT
        return [*events, Event("end")]

    def _means(self, marker: Marker) -> bool:
        if marker is Marker.THINK:
            return self._blank and self._state in (State.CONTENT, State.REASONING)
        if marker is Marker.END_CALLS and self._open and self._state is State.CONTENT:
            return True  # after text among the calls
        return self._state in _MEANS[marker]

    def _flush(self) -> list[Event]:
        tail = self._detokenizer.finish()
        self._detokenizer = Detokenizer(self._tokenizer)
        return self._text(tail)

    def _enter(self, marker: Marker) -> list[Event]:
        """Change the state at a marker that means something here."""
        if marker is Marker.SEP:
            return self._separate()
        following = {
            Marker.THINK: State.REASONING, Marker.END_THINK: State.CONTENT, Marker.CALLS: State.BETWEEN,
            Marker.CALL: State.TYPE, Marker.END_CALL: State.BETWEEN, Marker.END_CALLS: State.CONTENT,
        }  # fmt: skip
        self._state = following[marker]
        self._open = marker is Marker.CALLS or (self._open and marker is not Marker.END_CALLS)
        return []

    def _separate(self) -> list[Event]:
        """V3 names what is called, always "function", then the function; V3.1 names the function at once."""
        before = "".join(self._held)
        self._held = []
        if self._v3 and before.strip() == "function":
            self._state = State.NAME
            return []
        return self._begin(before, State.ARGUMENTS)

    def _begin(self, name: str, state: State) -> list[Event]:
        self._state, self._held, self._tail, self._fenced = state, [], "", False
        self._calls += 1
        return [Event("call", name.strip(), self._calls - 1)]

    def _close(self, ended: bool) -> list[Event]:
        """End a call. One that is ended after its name has no arguments; one without a name is none."""
        held, tail, state = "".join(self._held), self._tail, self._state
        self._held, self._tail, self._state = [], "", State.BETWEEN
        if state is State.NAME and ended:
            return self._begin(held, State.BETWEEN)
        if state in (State.TYPE, State.NAME):
            return [Event("content", held)] if held else []
        if tail in ("", _CLOSE):
            return []
        return [Event("arguments", tail, self._calls - 1)]

    def _text(self, piece: str) -> list[Event]:
        if not piece:
            return []
        if self._state is State.BETWEEN:
            if not piece.strip():
                return []
            self._state = State.CONTENT
        if self._state in (State.REASONING, State.CONTENT):
            self._blank = self._blank and not piece.strip()
            return [Event("reasoning" if self._state is State.REASONING else "content", piece)]
        if self._state is State.TYPE or (self._state is State.NAME and "\n" not in piece):
            self._held.append(piece)
            return []
        if self._state is State.NAME:
            end, _, rest = piece.partition("\n")
            return self._begin("".join(self._held) + end, State.FENCE) + self._text(rest)
        return self._fence(piece) if self._state is State.FENCE else self._arguments(piece)

    def _fence(self, piece: str) -> list[Event]:
        text = self._tail + piece
        self._fenced = text.startswith(_OPEN)
        if not self._fenced and _OPEN.startswith(text):
            self._tail = text
            return []
        self._state, self._tail = State.ARGUMENTS, ""
        return self._text(text.removeprefix(_OPEN))

    def _arguments(self, piece: str) -> list[Event]:
        text = self._tail + piece
        keep = next((n for n in range(len(_CLOSE), 0, -1) if text.endswith(_CLOSE[:n])), 0) if self._fenced else 0
        self._tail = text[len(text) - keep :]
        text = text[: len(text) - keep]
        return [Event("arguments", text, self._calls - 1)] if text else []
