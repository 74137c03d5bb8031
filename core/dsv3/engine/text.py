"""Between text and tokens: the tokenizer, incremental decoding, stop strings, chat templates."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.checkpoint.layout import read_json, read_text
from dsv3.errors import CheckpointError, UsageError
from dsv3.resources import resources

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A folder's tokenizer.json and tokenizer_config.json. `bos` and `eos` are token ids, None if unknown."""

    def __init__(self, inner: Any, settings: Mapping[str, Any], template: str | None) -> None:
        self._inner = inner
        self._settings = settings
        self._template = template
        self.for_grammars: Any = None  # see `Grammar.of`
        self.bos = self._token("bos_token")
        self.eos = self._token("eos_token")

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
        return cls(inner, settings, _template(folder, settings))

    def _token(self, name: str) -> int | None:
        text = _token_text(self._settings, name)
        return self._inner.token_to_id(text) if text else None

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

    def encode(self, text: str) -> list[int]:
        """Token ids, BOS first (once). UsageError for text that is no Unicode (lone surrogates)."""
        check_unicode(text)
        ids = list(self._inner.encode(text).ids)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text that already holds its special tokens."""
        check_unicode(text)
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=True))

    def piece_text(self, token: int) -> str:
        """One token as text, special ones by their names; U+FFFD for bytes that are no character by themselves."""
        return str(self._inner.decode([token], skip_special_tokens=False))

    def piece_bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        name = self._inner.id_to_token(token)
        table = _byte_letters()
        if name is not None and all(letter in table for letter in name):
            return bytes(table[letter] for letter in name)
        return self.piece_text(token).encode("utf-8", "replace")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that a conversation becomes, ready for the assistant's turn; it holds BOS. UsageError for
        messages that are not {"role", "content"}, or where the model has neither a template nor DeepSeek's
        markers."""
        for message in messages:
            if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise UsageError(f'a chat message is {message!r}; expected {{"role": ..., "content": ...}}')
        template = self._template
        if template is None:
            if self._inner.token_to_id("<｜User｜>") is None:
                raise UsageError("this model has no chat template; use a plain prompt")
            template = resources("configs", "templates", "deepseek_v3.jinja").read_text(encoding="utf-8")
        return _render(template, messages, self._settings)


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


def _render(template: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    values = {name: _token_text(settings, name) for name in ("bos_token", "eos_token")}
    try:
        return environment.from_string(template).render(messages=list(messages), add_generation_prompt=True, **values)
    except TemplateError as error:
        raise UsageError(f"the chat template refuses these messages: {error}") from error


class Detokenizer:
    """Text of a growing list of ids, in pieces that never end within a character; the pieces join to the whole decoded text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = self._upto = 0
        self._sent = 0

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        # Decoding starts one piece back, because a piece may depend on the one before it, and never at the beginning again.
        before = self._tokenizer.decode(self._ids[self._from : self._upto])
        after = self._tokenizer.decode(self._ids[self._from :])
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""
        self._from, self._upto = self._upto, len(self._ids)
        piece = after[len(before) :]
        self._sent += len(piece)
        return piece

    def finish(self) -> str:
        """What is left: an unfinished character, as the whole text shows it."""
        return self._tokenizer.decode(self._ids)[self._sent :]


class StopFinder:
    """Cuts a stream of text at the stop string that is complete first, holding back what might still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is safe to show."""
        if self.stopped or not self._stops:
            return "" if self.stopped else piece
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held
