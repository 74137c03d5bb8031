"""Answers of a given form: which tokens may come next, by llguidance."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.engine.text import Tokenizer
from dsv3.errors import UsageError

_ROW = 20_000  # items of the parser: 2,000, its default, are too few for the properties that 64 KiB of schema can name
_STEP = 500_000  # the same for one mask, of which a vocabulary of 129,280 tokens tries many
_FUEL = 250_000  # steps of building the lexer, a fourth of its default, with which (a{1000}){1000} takes a second
SPACE = r"\n?[ \t]{0,16}"  # an end to it, which small models do not find
_BURST, _EACH = 0.15, 0.004  # seconds of the engine's thread that a grammar may take, and for each mask: usual ones take 0.0001


@dataclass
class Allowance:
    """What the grammars of requests that belong together have taken: seconds, for masks."""

    taken: float = 0.0
    masks: int = 0


class Grammar:
    """What a request may say. It knows the accepted tokens; drafts are tried and taken back.

    All requests of a step wait for the masks of each, so there is an end to what one may take: where a text can be read in many
    ways, each token takes longer than the one before.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self.allowance = Allowance()

    @classmethod
    def of(cls, tokenizer: Tokenizer, kind: str, text: str, eos: Sequence[int], vocabulary: int) -> Grammar:
        """UsageError says what is wrong with the grammar."""
        import llguidance

        prepare(tokenizer, eos, vocabulary)
        try:
            if kind in ("json_schema", "json_object"):
                schema = text if kind == "json_schema" else json.dumps({"type": "object"})
                grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACE})
            elif kind == "regex":
                grammar = llguidance.LLMatcher.grammar_from_regex(text)
            else:
                grammar = llguidance.LLMatcher.grammar_from_lark(_by_id(text, tokenizer))
            limits = llguidance.LLParserLimits(max_items_in_row=_ROW, step_max_items=_STEP, initial_lexer_fuel=_FUEL)
            matcher = llguidance.LLMatcher(tokenizer.for_grammars, grammar, log_level=0, limits=limits)
        except ValueError as error:
            raise UsageError(f"grammar ({kind}): {error}") from error
        if matcher.is_error():
            raise UsageError(f"grammar ({kind}): {matcher.get_error().strip()}")
        found = cls(matcher, vocabulary)
        with found._timed():
            found._mask()  # what cannot even begin is said now, while nobody waits for it
        found.allowance = Allowance()
        return found

    def another(self) -> Grammar:
        """The same, at its beginning as this one is: compiled once for many."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary)

    @property
    def finished(self) -> bool:
        """Nothing can follow."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Take a token that was allowed. UsageError where the grammar has become too costly."""
        with self._timed():
            self._matcher.consume_token(token)
            self._check()

    def masks(self, drafts: Sequence[int]) -> list[Tensor]:
        """Which tokens are allowed next (bool [V]), and after each draft, up to the first draft that is not allowed itself.
        UsageError where the grammar has become too costly."""
        with self._timed():
            return self._masks(drafts)

    def _masks(self, drafts: Sequence[int]) -> list[Tensor]:
        begun = time.thread_time()
        found, tried = [self._mask()], 0
        for token in drafts:
            if time.thread_time() - begun > _EACH * (1 + len(drafts)):  # fewer of them are verified then
                break
            if not bool(found[-1][token]) or not self._matcher.consume_token(token):
                break
            tried += 1
            if self._matcher.is_stopped():
                break
            found.append(self._mask())
        if tried:
            self._matcher.rollback(tried)
        return found

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """UsageError once the grammar has taken too long. Time that other processes take is not counted."""
        begun, so_far = time.thread_time(), self.allowance
        yield
        so_far.taken += time.thread_time() - begun
        if so_far.taken > _BURST + _EACH * so_far.masks:
            raise UsageError(
                f"the grammar is too costly: {so_far.taken:.2f} s for {so_far.masks} tokens; what costs are rules that may be "
                "empty and are repeated, texts that can be read in several ways, and many hundreds of optional properties"
            )

    def _check(self) -> None:
        """The library says nothing by itself: a matcher that failed allows the end alone."""
        if not self._matcher.is_error():
            return
        why = self._matcher.get_error().strip().splitlines()[0]
        if "NoExtension" in why:
            raise UsageError("the grammar allows nothing")
        followed = "doesn't satisfy the grammar" not in why
        raise UsageError(f"the grammar is too costly: {why}" if followed else f"the grammar was not followed: {why}")

    def _mask(self) -> Tensor:
        self.allowance.masks += 1
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(np.bool_))


def prepare(tokenizer: Tokenizer, eos: Sequence[int], vocabulary: int) -> None:
    """Read the vocabulary, which takes a second for 129,280 tokens, with Python's lock held, and once."""
    import llguidance

    if tokenizer.for_grammars is None:
        tokenizer.for_grammars = llguidance.LLTokenizer(_unspoken(tokenizer), n_vocab=vocabulary, eos_token=sorted(eos))


def _by_id(lark: str, tokenizer: Tokenizer) -> str:
    """Control tokens that a grammar names, outside of its strings and regular expressions, by their ids."""

    def written(found: re.Match[str]) -> str:
        token = tokenizer.token_id(found[1]) if found[1] in control else None
        return found[0] if token is None else f"<[{token}]>"

    control = set(tokenizer.control)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|(<[^<>\s]+>)', written, lark)


def _unspoken(tokenizer: Tokenizer) -> str:
    """tokenizer.json with names for control tokens that no text has: where a grammar leaves no choice the library tokenises the
    text that must come, and a `<think>` in it has to become letters and not the token, which no text may be."""
    found, control = json.loads(tokenizer.to_json()), set(tokenizer.control)
    names = {}
    for token in found.get("added_tokens") or []:
        if token["content"] in control:
            names[token["content"]] = f"\U0010fffd{token['id']}\U0010fffd"
            token.update(content=names[token["content"]], special=True)
    vocabulary = found["model"]["vocab"]
    if isinstance(vocabulary, dict):
        found["model"]["vocab"] = {names.get(name, name): i for name, i in vocabulary.items()}
    found["post_processor"] = None  # it names control tokens too
    return json.dumps(found)
