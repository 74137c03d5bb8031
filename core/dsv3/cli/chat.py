"""`dsv3 chat`: a conversation in the terminal, with reasoning set apart, settings that change on the way, and a history."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dsv3.cli.common import load_model, settings_of
from dsv3.cli.streams import read_line, text_stream
from dsv3.cli.text import statistics
from dsv3.engine.options import check_options
from dsv3.errors import Dsv3Error, UsageError, nearest
from dsv3.settings import state_folder

if TYPE_CHECKING:
    from dsv3.engine.model import Model

_SAMPLING = ("max_new_tokens", "temperature", "top_p", "seed", "draft")
_CONVERSATION = 4096  # tokens that a conversation is expected to have
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTINUED = '"""'


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    options = {name: settings[name] for name in _SAMPLING}
    check_options(**options)
    if settings["device"] == "meta":
        raise UsageError("device 'meta' has shapes but no weights; it cannot talk")
    with text_stream(restore=not arguments.whole_process) as out:
        model = load_model(arguments, settings)
        print(f"dsv3: {model.placement().summary}", file=sys.stderr)
        device = model.placement().device
        if device.family != "cpu" and not device.emulated:
            model.warm_up(1, True, tokens=_CONVERSATION, draft=options["draft"])
        converse(model, options, out, arguments.system)
    return 0


def converse(model: Model, options: dict[str, Any], out: TextIO, system: str | None = None) -> None:
    """Ask and answer until /exit or the end of input. Ctrl-C ends a reply."""
    model.chat_ids([{"role": "user", "content": ""}])  # a model without a template is refused before the first question
    conversation = Conversation(model, dict(options), out, system)
    print("dsv3: /help lists the commands, /exit ends it, Ctrl-C ends a reply", file=sys.stderr)
    with _History():
        while (text := _ask()) is not None:
            if text.strip() and not conversation.take(text.strip()):
                return


class Conversation:
    """Messages so far, and what changes how the next is answered."""

    def __init__(self, model: Model, options: dict[str, Any], out: TextIO, system: str | None) -> None:
        self.model, self.options, self.out = model, options, out
        self.thinking: bool | None = None
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._commands: dict[str, tuple[Callable[[list[str]], bool | None], str]] = {
            "/help": (self._help, "this list"),
            "/clear": (self._clear, "forget the conversation"),
            "/undo": (self._undo, "forget the last question and its answer"),
            "/retry": (self._retry, "answer the last question again"),
            "/system": (self._system, "TEXT: what the model is told first; without TEXT nothing"),
            "/set": (
                self._set,
                "NAME VALUE: temperature, top_p, seed, draft_tokens and the like, or thinking",
            ),
            "/show": (self._show, "the options, and how long the conversation is"),
            "/save": (self._save, "FILE: write the conversation as JSON"),
            "/load": (self._load, "FILE: go on with a conversation that was saved"),
            "/exit": (lambda _: True, "end the program; so does /quit"),
        }

    def take(self, text: str) -> bool:
        """A line of the user's; False if it was the last."""
        name = text.split()[0]
        if not name.startswith("/"):
            self._answer(text)
            return True
        found = self._commands.get("/exit" if name == "/quit" else name)
        if found is None:
            _say(f"{name} is no command{nearest(name, self._commands)}; /help lists them")
            return True
        try:
            words = [text[len(name) :].strip()] if name == "/system" else shlex.split(text)[1:]
            return found[0](words) is not True
        except (Dsv3Error, ValueError) as error:
            _say(f"error: {error}")
        except OSError as error:
            _say(f"error: {error.filename}: {error.strerror}")
        return True

    # -- commands

    def _help(self, words: list[str]) -> None:
        for name, (_, text) in self._commands.items():
            _say(f"{name:8} {text}")
        _say(f"several lines: between lines of {_CONTINUED}")

    def _clear(self, words: list[str]) -> None:
        self.messages.clear()
        _say("forgotten")

    def _undo(self, words: list[str]) -> None:
        if not self.messages:
            raise UsageError("there is nothing to undo")
        del self.messages[-2:]
        _say(f"forgotten; {_answered(self.messages)} are left")

    def _retry(self, words: list[str]) -> None:
        if not self.messages:
            raise UsageError("there is no question yet")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self._answer(question)

    def _system(self, words: list[str]) -> None:
        self.system = words[0] or None
        _say("set" if self.system else "nothing is said first")

    def _set(self, words: list[str]) -> None:
        if len(words) != 2:
            raise UsageError("/set takes a name and a value: /set temperature 0.7")
        name, text = words
        with suppress(json.JSONDecodeError):
            text = json.loads(text)
        value: Any = {"none": None, "on": True, "off": False}.get(str(text).lower(), text)
        if name == "thinking":
            self.model.chat_ids([{"role": "user", "content": "?"}], thinking=value)
            self.thinking = value
        else:
            changed = {**self.options, name: value}
            if name == "draft_tokens":
                changed["draft"] = "mtp" if value else None
                if not value:
                    del changed["draft_tokens"]
            check_options(**changed)
            self.options = changed
        _say(f"{name} = {value}")

    def _show(self, words: list[str]) -> None:
        for name, value in {**self.options, "thinking": self.thinking, "system": self.system}.items():
            _say(f"{name} = {value}")
        if self.messages:
            tokens = len(self.model.chat_ids(self._told(self.messages)))
            _say(f"{tokens} tokens in {_answered(self.messages)}")

    def _save(self, words: list[str]) -> None:
        path = _file("/save", words)
        part = path.with_name(f"{path.name}.part")
        found = {"system": self.system, "messages": self.messages}
        part.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")
        os.replace(part, path)
        _say(f"written to {path}")

    def _load(self, words: list[str]) -> None:
        path = _file("/load", words)
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            found = None
        messages: Any = found.get("messages") if isinstance(found, dict) else None
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages] if isinstance(messages, list) else [None]
        system = found.get("system") if isinstance(found, dict) else None
        if roles != ["user", "assistant"] * (len(roles) // 2) or not isinstance(system, str | None):
            raise UsageError(f"{path} is no conversation that /save wrote")
        self.model.chat_ids([*messages, {"role": "user", "content": "?"}])
        self.messages, self.system = messages, system
        _say(_answered(messages))

    # -- answers

    def _told(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + messages

    def _answer(self, question: str) -> None:
        """Stream the answer; what was said of it stays even if it was cut short."""
        messages = [*self.messages, {"role": "user", "content": question}]
        said: list[str] = []
        stats = None
        try:
            prompt = self.model.chat_format.prompt(self._told(messages), thinking=self.thinking)
            splitter = self.model.chat_format.splitter(prompt, tools=False)
            for events, result in self.model.follow(prompt.ids, **self.options):
                pieces = [piece for token, text in events for piece in splitter.push(token, text)]
                self._write(pieces if result is None else [*pieces, *splitter.finish()], said)
                stats = stats if result is None else result.stats
        except KeyboardInterrupt:
            _say("reply ended", before="\n")
        except Dsv3Error as error:
            _say(f"error: {error}" + ("; /clear or /undo makes room" if self.messages else ""))
            return
        finally:
            self._style("")
        print(file=self.out, flush=True)
        self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        if stats is not None:
            print(statistics(stats), file=sys.stderr)

    def _write(self, pieces: list[Any], said: list[str]) -> None:
        for piece in pieces:
            if piece.kind == "content":
                if self._now == "reasoning":
                    self._style("")
                    self.out.write("\n\n")
                said.append(piece.text)
            elif piece.kind != "reasoning":
                continue
            self._style(piece.kind if piece.kind == "reasoning" else "")
            self.out.write(piece.text)
        self.out.flush()

    _now = ""

    def _style(self, kind: str) -> None:
        """Reasoning is dim on a terminal."""
        if kind != self._now:
            self._now = kind
            if self.out.isatty() and "NO_COLOR" not in _environment():
                self.out.write(_DIM if kind else _PLAIN)
                self.out.flush()


def _environment() -> dict[str, str]:
    from dsv3.settings import environment

    return environment()


def _say(text: str, before: str = "") -> None:
    print(f"{before}dsv3: {text}", file=sys.stderr)


def _answered(messages: list[Any]) -> str:
    count = len(messages) // 2
    return f"{count} question{'s' * (count != 1)} and answer{'s' * (count != 1)}"


def _file(command: str, words: list[str]) -> Path:
    if len(words) != 1:
        raise UsageError(f"{command} takes one file name")
    return Path(words[0]).expanduser()


def _ask() -> str | None:
    """A question, None at the end of input; Ctrl-C here asks again. Several lines between lines of three quotes."""
    lines: list[str] = []
    inside = False
    while True:
        try:
            line = read_line("... " if inside else ">>> ")
        except KeyboardInterrupt:
            print(file=sys.stderr)
            lines, inside = [], False
            continue
        except UsageError as error:
            _say(f"error: {error}")
            continue
        if line is None:
            return "\n".join(lines) if lines else None
        if line.strip() == _CONTINUED:
            if inside:
                return "\n".join(lines)
            inside = True
            continue
        if not inside:
            return line
        lines.append(line.rstrip("\n"))


class _History:
    """What was asked in earlier conversations, under the arrow keys of a terminal."""

    def __enter__(self) -> None:
        self._path: Path | None = None
        if sys.stdin is None or not sys.stdin.isatty():
            return
        with suppress(ImportError, OSError):
            import readline

            path = state_folder() / "chat_history"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.read_history_file(path)
            readline.set_history_length(1000)
            self._path = path

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            with suppress(ImportError, OSError):
                import readline

                readline.write_history_file(self._path)
