"""What somebody says stays text: marks within it that keep it from becoming the tokens that structure a conversation."""

from __future__ import annotations

import re
import secrets
from typing import Any

from dsv3.engine.text import Tokenizer

_MARK = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # noncharacters: no text means anything by them, and no filter changes them


class Control:
    """A tokenizer's control tokens, ready to be looked for. Made once, used by every `Guard`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokens = tokenizer.control
        one = _pattern(tokens) or r"(?!)"
        self.split = re.compile(f"({one})")
        self.begin = re.compile(f"(?={one}).", re.DOTALL)  # the first character of each, overlapping ones too
        self.longest = max(map(len, tokens), default=1)
        self.starts = frozenset(t[:n] for t in tokens for n in range(1, len(t)))
        self.ends = frozenset(t[n:] for t in tokens for n in range(1, len(t)))
        self.all = "\0".join(tokens)


def _pattern(words: list[str]) -> str:
    """A regular expression for any of the words, a longer one first. A tree: a flat list of DeepSeek's 800 would be tried
    whole at each "<" of a text."""
    tails: dict[str, list[str]] = {}
    for word in filter(None, words):
        tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + _pattern(rest) for first, rest in tails.items()]
    if "" in words and branches:
        branches.append("")
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""


class Guard:
    """Marks said text, lets a template render it, and turns the result into tokens.

    A mark is put after the first character of everything in the said text that reads like a control token, and at an end that
    could complete one together with what stands beside it. Harmless text has no mark and stays exactly itself, so that a
    template may trim, split and compare it. The mark is random: nobody can write it.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._mark = "".join(secrets.choice(_MARK) for _ in range(24))  # 120 random bits

    def said(self, value: Any) -> Any:
        """The same value with all its text, keys included, marked."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list | tuple):
            return [self.said(v) for v in value]
        if isinstance(value, dict):
            return {self.said(k): self.said(v) for k, v in value.items()}
        return value

    def _text(self, text: str) -> str:
        control, mark = self._control, self._mark
        marked = control.begin.sub(lambda found: found.group() + mark, text)
        short = range(1, min(len(text), control.longest) + 1)
        within = 0 < len(text) < control.longest and text in control.all
        if within or any(text[:n] in control.ends for n in short):
            marked = mark + marked
        if within or any(text[-n:] in control.starts for n in short):
            marked += mark
        return marked

    def plain(self, rendered: str) -> str:
        """Rendered text without marks."""
        return rendered.replace(self._mark, "")

    def ids(self, rendered: str) -> list[int]:
        """Token ids of rendered text: control tokens are those of the template, none of what was said.

        A tokenizer itself cuts a text at its added tokens first and encodes what lies between piece by piece. Cutting marked
        text at the template's control tokens therefore gives the ids that encoding in one go would, except where a mark was;
        a cut at the edges of what was said would not, as merges reach across them.
        """
        tokenizer = self._control.tokenizer
        if self._mark not in rendered:
            return tokenizer.encode_plain(rendered)
        ids: list[int] = []
        plain = ""
        for part in self._control.split.split(rendered):
            if self._mark in part:
                ids += tokenizer.encode_plain(plain) + tokenizer.encode_literal(self.plain(part))
                plain = ""
            else:
                plain += part
        return ids + tokenizer.encode_plain(plain)
