"""Between text and tokens: the tokenizer, incremental decoding, stop strings."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.checkpoint.layout import read_json, read_text
from dsv3.errors import CheckpointError, UsageError

_REPLACEMENT = "\ufffd"
_LONG = 1 << 14  # characters that take longer to encode than others should wait
_WINDOW = 64  # tokens decoded anew with each one, at most, while a character is unfinished
_ENCODER = Path("encoding", "encoding_dsv32.py")


class Tokenizer:
    """A folder's tokenizer.json and tokenizer_config.json.

    bos, eos: token ids, None if unknown. template: the folder's own chat template, None if it has none. encoder: whether the
    folder renders conversations by Python code (which is never run) instead, as DeepSeek-V3.2 does.
    """

    def __init__(self, inner: Any, settings: Mapping[str, Any], template: str | None, encoder: bool = False) -> None:
        self._inner = inner
        self._settings = settings
        self.template = template
        self.encoder = encoder
        self.for_grammars: Any = None  # see `Grammar.of`
        self.bos = self._token("bos_token")
        self.eos = self._token("eos_token")
        self._special = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """None if the folder has no tokenizer.json; CheckpointError if it has a broken one, or a broken template."""
        path = folder / "tokenizer.json"
        if not path.exists() and not path.is_symlink():
            return None
        text = read_text(path)
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path.name}: not a tokenizer: {error}; download it again") from error
        inner.no_truncation()
        inner.no_padding()
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        for name in ("bos_token", "eos_token"):
            _check_token(settings, name, inner)
        return cls(inner, settings, _template(folder, settings), (folder / _ENCODER).exists())

    def _token(self, name: str) -> int | None:
        text = self.token_text(name)
        return self._inner.token_to_id(text) if text else None

    def token_text(self, name: str) -> str:
        """The text of "bos_token" or "eos_token", "" if there is none."""
        return _token_text(self._settings, name)

    def token_id(self, text: str) -> int | None:
        """The id of a token, None if this is no token."""
        found = self._inner.token_to_id(text)
        return None if found is None else int(found)

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._inner.get_vocab_size())

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self._inner.to_str())

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones included, and its id."""
        return dict(self._inner.get_vocab())

    @property
    def control(self) -> list[str]:
        """The tokens that structure a conversation and must not come from what somebody says in it, longest first.

        DeepSeek's tokenizer marks only a few as special: `<｜User｜>`, `<think>` and the tool markers are ordinary added
        tokens. Hence also every added token in angle brackets counts, and in bars like V3.2's `｜DSML｜`.
        """
        added = self._inner.get_added_tokens_decoder().values()
        found = {t.content for t in added if t.special or (t.content[:1] + t.content[-1:]) in ("<>", "｜｜")}
        return sorted((t for t in found if len(t) > 1), key=lambda t: (-len(t), t))

    def encode(self, text: str) -> list[int]:
        """Token ids, BOS first (once). UsageError for text that is no Unicode (lone surrogates)."""
        ids = _encoded(self._inner, text, True)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text that already holds its special tokens."""
        return _encoded(self._inner, text, False)

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of text in which nothing is a special token, whatever it looks like.

        The library's `encode_special_tokens` would leave the added tokens that are not marked special, and it is a mode that
        threads would share. This is by a tokenizer without added tokens: it normalises, splits, and has the same merges.
        """
        return _encoded(self._bare, text, False)

    @functools.cached_property
    def _bare(self) -> Any:
        found = type(self._inner)(self._inner.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._inner, part) is not None:
                setattr(found, part, getattr(self._inner, part))
        return found

    def silent(self, token: int) -> bool:
        """Whether `decode` leaves this id out."""
        return token in self._special or self._inner.id_to_token(int(token)) is None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        found = [int(i) for i in ids]
        if len(found) < _LONG:
            return str(self._inner.decode(found, skip_special_tokens=True))
        return str(self._inner.decode_batch([found], skip_special_tokens=True)[0])

    def piece_text(self, token: int) -> str:
        """One token as text, special ones by their names; U+FFFD for bytes that are no character by themselves."""
        return str(self._inner.decode([token], skip_special_tokens=False))

    def piece_name(self, token: int) -> str:
        """As `piece_text`, but bytes that are no characters by themselves are written as OpenAI's API does: bytes:\\xc3."""
        data = self.piece_bytes(token)
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return self.piece_text(token)

    def piece_bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        name = self._inner.id_to_token(token)
        table = _byte_letters()
        if name is not None and all(letter in table for letter in name):
            return bytes(table[letter] for letter in name)
        return self.piece_text(token).encode("utf-8", "replace")


def _encoded(inner: Any, text: str, special: bool) -> list[int]:
    """The library keeps Python's lock while it encodes one text, seconds for megabytes, and gives it back for a batch."""
    check_unicode(text)
    if len(text) < _LONG:
        return list(inner.encode(text, add_special_tokens=special).ids)
    return list(inner.encode_batch_fast([text], add_special_tokens=special)[0].ids)


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Byte-level tokenizers write a byte as a printable letter: itself where it is one, else the next of those from U+0100 on
    (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {chr(byte): byte for byte in plain}
    for n, byte in enumerate(byte for byte in range(256) if byte not in plain):
        found[chr(256 + n)] = byte
    return found


def check_unicode(text: str) -> None:
    """UsageError for what a non-UTF-8 argument or input becomes in Python: lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not UTF-8 (character {error.start}); encode it as UTF-8") from error


def _token_text(settings: Mapping[str, Any], name: str) -> str:
    """The text of a special token, "" if there is none; old files wrap it in an object."""
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _check_token(settings: Mapping[str, Any], name: str, inner: Any) -> None:
    if settings.get(name) is None:
        return
    text = _token_text(settings, name)
    if not text or inner.token_to_id(text) is None:
        found = repr(settings[name])[:80]
        raise CheckpointError(
            f"tokenizer_config.json: {name}: expected a token of tokenizer.json; found {found}; download both files again"
        )


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else the field of tokenizer_config.json; of several named ones, "default"."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else ""
        if not isinstance(found, str) or not found:
            raise CheckpointError(
                "tokenizer_config.json: chat_template: expected a template named 'default'; found none; download it again"
            )
    if found is not None and not isinstance(found, str):
        kind = type(found).__name__
        raise CheckpointError(f"tokenizer_config.json: chat_template: expected text; found {kind}; download it again")
    return found


class Detokenizer:
    """Text of a growing list of ids, in pieces that never end within a character; the pieces join to the whole decoded text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = 0  # characters returned
        self._window: list[int] = []  # the last ids with text
        self._shown = 0  # characters of the window's text that were returned
        self._last = 0  # where in the window the last piece begins

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        if self._tokenizer.silent(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # What may still become another character are the last bytes, up to three, which show as replacement characters.
        settled = len(text) - min(3, len(text) - len(text.rstrip(_REPLACEMENT)))
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        self._sent += len(piece)
        if piece and settled == len(text):
            # Decoding starts one piece back, because a piece may depend on the one before it, and never at the beginning again.
            del self._window[: self._last]
            self._last = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        elif len(self._window) % _WINDOW == 0:
            self._shorten(text)
        return piece

    def _shorten(self, text: str) -> None:
        """Drop the older half of a window whose text has had no settled end for long: a model that never completes a character
        would have all of them decoded again with each token."""
        tail = self._tokenizer.decode(self._window[_WINDOW // 2 :])
        # Both end alike, and by more than the bytes that one character can have, so both go on alike.
        if len(tail) > 8 and text.endswith(tail[4:]):
            self._shown = max(0, self._shown - (len(text) - len(tail)))
            del self._window[: _WINDOW // 2]
            self._last = 0

    def finish(self) -> str:
        """What is left: an unfinished character, as the whole text shows it."""
        return self._tokenizer.decode(self._ids)[self._sent :]


class StopFinder:
    """Cuts a stream of text at the stop string that is complete first, holding back what might still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [s for s in stops if s]
        self._held = ""
        self.stopped = False

    @property
    def looks(self) -> bool:
        """Whether there are stop strings."""
        return bool(self.stops)

    def push(self, piece: str) -> str:
        """The text that is safe to show."""
        if self.stopped or not self.stops:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held
