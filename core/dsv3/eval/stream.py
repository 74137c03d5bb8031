"""One stream of tokens from many texts, and the windows that are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsv3.errors import UsageError
from dsv3.eval.texts import Text

if TYPE_CHECKING:
    from dsv3.engine.model import Model

LEAST = 3  # tokens: two to predict, so that an MTP module has a row


@dataclass(frozen=True)
class Stream:
    """ids [N] of all documents, each BOS + its tokens + EOS, one after the other; owner [N]: which text a token is of;
    nbytes [N]: the UTF-8 bytes of its document, spread evenly over the document's tokens, BOS and EOS among them."""

    ids: NDArray[np.int64]
    owner: NDArray[np.int64]
    nbytes: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, tokens: int | None) -> Stream:
        """As many tokens as it takes to predict `tokens` of them; None: all."""
        if tokens is None:
            return self
        return Stream(self.ids[: tokens + 1], self.owner[: tokens + 1], self.nbytes[: tokens + 1])


@dataclass(frozen=True)
class Windows:
    """count windows of `size` inputs, window w starting at w * size; its targets are one token further."""

    stream: Stream
    size: int
    count: int

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return self.size * self.count

    def rows(self, first: int, stop: int) -> NDArray[np.int64]:
        """[stop - first, size + 1]: inputs and the last target."""
        return np.stack([self.stream.ids[w * self.size : (w + 1) * self.size + 1] for w in range(first, stop)])

    def batches(self, most: int) -> Iterator[NDArray[np.int64]]:
        """All windows, as many together as have `most` inputs, at least one."""
        step = max(1, most // self.size)
        for first in range(0, self.count, step):
            yield self.rows(first, min(first + step, self.count))

    @property
    def owner(self) -> NDArray[np.int64]:
        """[tokens]: the text of every token that is predicted."""
        return self.stream.owner[1 : self.tokens + 1]


def encode(model: Model, texts: Sequence[Text]) -> Stream:
    """The stream of some texts. UsageError if the model has no tokenizer, or one that goes beyond its vocabulary."""
    tokenizer = model.tokenizer
    name = model.placement().model
    if tokenizer is None:
        raise UsageError(f"the folder of {name} has no tokenizer.json, so no text can be scored; copy it beside config.json")
    eos = tokenizer.eos if tokenizer.eos is not None else next(iter(model.config.eos_token_id), None)
    ids, owner, nbytes = [], [], []
    for n, text in enumerate(texts):
        for document in text.documents:
            inner = tokenizer.encode_plain(document)
            tokens = [t for t in (tokenizer.bos, *inner, eos) if t is not None]
            ids += tokens
            owner += [n] * len(tokens)
            nbytes += [len(document.encode("utf-8")) / max(len(tokens), 1)] * len(tokens)
    if ids and max(ids) >= model.config.vocab_size:
        raise UsageError(
            f"the tokenizer of {name} gives token {max(ids)}, its vocabulary has {model.config.vocab_size}; "
            "the folder holds the tokenizer of another model"
        )
    return Stream(np.array(ids, np.int64), np.array(owner, np.int64), np.array(nbytes, np.float64))


def cut(stream: Stream, window: int, longest: int) -> Windows:
    """Consecutive windows; a last one that is not full is dropped, but a stream shorter than one window is a single short one.
    longest: what the model reads. UsageError if that is less than the window, or there is almost no text."""
    if len(stream) < LEAST:
        raise UsageError(f"{len(stream)} tokens of text; at least {LEAST} are needed to score any")
    size = min(window, len(stream) - 1)
    if size > longest:
        raise UsageError(f"a window of {size} tokens; this model reads at most {longest}: give a smaller --window")
    return Windows(stream, size, (len(stream) - 1) // size)
