"""Between text and tokens: the tokenizer, incremental decoding, stop strings, chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.checkpoint.layout import read_json
from dsv3.errors import CheckpointError, UsageError
from dsv3.resources import resources

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A folder's tokenizer.json. `bos` and `eos` are token ids, None if unknown."""

    def __init__(self, inner: Any, settings: Mapping[str, Any], template: str | None) -> None:
        self._inner = inner
        self._settings = settings
        self._template = template
        self.bos = self._token("bos_token")
        self.eos = self._token("eos_token")

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """None if the folder has no tokenizer.json; CheckpointError if it has a broken one."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path.name}: not a tokenizer: {error}; download it again") from error
        inner.no_truncation()
        inner.no_padding()
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        template_path = folder / "chat_template.jinja"
        template = template_path.read_text(encoding="utf-8") if template_path.exists() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return cls(inner, settings, template)

    def _token(self, name: str) -> int | None:
        value = self._settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return self._inner.token_to_id(text) if isinstance(text, str) else None

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._inner.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids, BOS first (once)."""
        ids = list(self._inner.encode(text).ids)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text that already holds its special tokens."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=True))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that a conversation becomes, ready for the assistant's turn; it holds BOS. UsageError for
        messages that are not {"role", "content"}, or where the model has neither a template nor DeepSeek's
        markers."""
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise UsageError(f'a chat message is {message!r}; expected {{"role": ..., "content": ...}}')
        template = self._template
        if template is None:
            if self._inner.token_to_id("<｜User｜>") is None:
                raise UsageError("this model has no chat template; use a plain prompt")
            template = resources("configs", "templates", "deepseek_v3.jinja").read_text(encoding="utf-8")
        return _render(template, messages, self._settings)


def _render(template: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def content(name: str) -> str:
        value = settings.get(name)
        return (value.get("content") if isinstance(value, dict) else value) or ""

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    values = {name: content(name) for name in ("bos_token", "eos_token")}
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
