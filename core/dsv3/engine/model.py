"""A loaded model as a library object: asked for logits and for text, at once, piece by piece, by coroutines; through one engine
for all who ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from dsv3.engine.cache import Run
from dsv3.engine.chat import ChatFormat
from dsv3.engine.engine import PREFILL_TOKENS, Engine, failed
from dsv3.engine.executor import Executor
from dsv3.engine.grammar import Grammar, prepare
from dsv3.engine.ids import as_ids
from dsv3.engine.options import MAX_BATCH, Sampling, check_options, is_integer
from dsv3.engine.request import Generation, Request
from dsv3.engine.sample import signed
from dsv3.engine.text import Tokenizer
from dsv3.engine.warmup import warm_up
from dsv3.errors import UsageError
from dsv3.graph.weights import walk
from dsv3.plugin import Prepared

if TYPE_CHECKING:
    from dsv3.dispatch.check import CheckReport


class Model(Executor):
    """What `dsv3.load` returns. config: ModelConfig. tokenizer: `.encode(text)`, `.decode(ids)`, or None."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.tokenizer: Tokenizer | None = None
        self.chat_family: str | None = None  # see `ChatFormat.of`
        self._chat: tuple[Tokenizer, ChatFormat] | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._engine: Engine | None = None

    def __repr__(self) -> str:
        return f"<dsv3.Model {self._placement.summary}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is being generated and give the cache's memory back. The model can be used again after it."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @property
    def engine(self) -> Engine:
        """What generates; made when it is first asked for."""
        with self._lock:
            if self._engine is None:
                self._engine = Engine(self)
            return self._engine

    def serve_with(self, **options: Any) -> Engine:
        """An engine with these options (see `Engine`) instead of the one there is."""
        self.close()
        with self._lock:
            self._engine = Engine(self, **options)
            return self._engine

    def check_report(self) -> CheckReport | None:
        """What `load(check=True)`, or DSV3_CHECK=1, has found so far; None without it."""
        checker = self._placement.binding.checker
        return None if checker is None else checker.report

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, as they are kept."""
        skip = ("w_uk", "w_uv")
        values = [value for _, _, name, value in walk(self._graph.w) if name not in skip]
        return sum(v.nbytes if isinstance(v, Prepared) else v.numel() * v.element_size() for v in values)

    def logits(self, ids: Many[int] | Tensor, *, chunk: int = PREFILL_TOKENS, absorbed: bool = False) -> Tensor:
        """[T, V] on the CPU: row i predicts token i + 1. Computed in dtype, returned as float32 (float64 if dtype is).

        chunk: tokens per step. absorbed: attend over the latent cache, as decoding does, instead of expanded keys.
        """
        tokens = self._checked(ids, 1)
        _check_chunk(chunk)
        cache = self.new_cache([len(tokens)])
        rows = []
        for at in range(0, len(tokens), chunk):
            hidden, _ = self.forward(cache, [Run(0, tokens[at : at + chunk], at)], absorbed)
            rows.append(self._out(self.head(hidden)))
        return torch.cat(rows)

    def mtp_logits(self, ids: Many[int] | Tensor, *, chunk: int = PREFILL_TOKENS, absorbed: bool = False) -> Tensor:
        """[T - 1, V]: row i predicts token i + 2 from the hidden state of position i and token i + 1."""
        tokens = self._checked(ids, 2)
        self._needs_mtp("mtp_logits")
        _check_chunk(chunk)
        cache = self.new_cache([len(tokens)])
        rows = []
        for at in range(0, len(tokens) - 1, chunk):
            part = tokens[at : min(at + chunk, len(tokens) - 1)]
            _, states = self.forward(cache, [Run(0, part, at)], absorbed)
            following = Run(0, tokens[at + 1 : at + 1 + len(part)], at + 1)
            rows.append(self._out(self.head(self.mtp_forward(cache, [following], states, absorbed))))
        return torch.cat(rows)

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Many[str] = (),
        ignore_eos: bool = False,
        draft: Literal["mtp"] | None = None,
        **more: Any,
    ) -> Any:
        """Continue prompts. A str (encoded with BOS) or a list of ids (taken as they are) gives a Generation; a list
        of either a list of them, in order. draft "mtp": guess with the MTP module and verify; the tokens are the
        same, in fewer steps. more: the other options of `Sampling`."""
        single, many = _prompts(prompts)
        options = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop,
            "ignore_eos": ignore_eos, "draft": draft, **more,
        }  # fmt: skip
        requests = self.requests(many, options)
        engine = self.engine
        engine.submit(requests)
        for _ in engine.drive(requests):
            pass
        results = _results(requests)
        return results[0] if single else results

    async def agenerate(self, prompts: Any, **options: Any) -> Any:
        """`generate`, for coroutines: a thread drives the engine. Cancelling it ends the generation."""
        single, many = _prompts(prompts)
        requests = self.requests(many, options)
        async for _ in self._followed(requests):
            pass
        results = _results(requests)
        return results[0] if single else results

    async def astream(self, prompt: Any, **options: Any) -> AsyncIterator[str]:
        """`stream`, for coroutines."""
        async for text in self._followed(self.requests([prompt], options)):
            if text:
                yield text

    async def _followed(self, requests: list[Request]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        mail: asyncio.Queue[tuple[Request, str]] = asyncio.Queue()

        def tell(request: Request, text: str) -> None:
            # The loop may have ended by then, and nobody asks for the text.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(mail.put_nowait, (request, text))

        engine, open_ = self.engine, set(requests)
        engine.start()
        try:
            engine.submit(requests, tell)
            while open_:
                request, text = await mail.get()
                if request.done:
                    open_.discard(request)
                yield text
        finally:
            engine.abort([r for r in requests if not r.done])
        if (error := failed(requests)) is not None:
            raise error

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """The text of `generate(prompt, ...)` piece by piece; the pieces join to its text. Wrong arguments raise at once."""
        return (piece for piece, _ in self.stream_events(prompt, **options) if piece)

    def stream_events(self, prompt: Any, **options: Any) -> Iterator[tuple[str, Generation | None]]:
        """(text piece, None) as it appears, at last ("", Generation)."""
        followed = self.follow(prompt, **options)

        def pieces() -> Iterator[tuple[str, Generation | None]]:
            for events, result in followed:
                if text := "".join(text for _, text in events):
                    yield text, None
                if result is not None:
                    yield "", result

        return pieces()

    def follow(self, prompt: Any, **options: Any) -> Iterator[tuple[list[tuple[int, str]], Generation | None]]:
        """New tokens, each with its text, as they may be shown: [(id, text)], of which -1 is text that no token completed; with
        the last of them the Generation. They join to its text. Wrong arguments raise at once."""
        (request,) = self.requests([prompt], options)

        def steps() -> Iterator[tuple[list[tuple[int, str]], Generation | None]]:
            engine = self.engine
            engine.submit([request])
            for _ in engine.drive([request]):
                if not request.done and request.events:
                    yield request.take_events(), None
            yield request.take_events(), _results([request])[0]

        return steps()

    def chat(self, messages: Many[Mapping[str, Any]], *, thinking: bool | None = None, **options: Any) -> Generation:
        """Answer a conversation of {"role", "content"} messages, through the model's chat template; thinking as there."""
        result: Generation = self.generate(self.chat_ids(messages, thinking=thinking), **options)
        return result

    @property
    def chat_format(self) -> ChatFormat:
        """How this model reads conversations. UsageError if it has no way to."""
        tokenizer = self._needs_tokenizer()
        if self._chat is None or self._chat[0] is not tokenizer:
            self._chat = (tokenizer, ChatFormat.of(tokenizer, self.chat_family))
        return self._chat[1]

    def chat_ids(
        self, messages: Many[Mapping[str, Any]], *, tools: Many[Mapping[str, Any]] | None = None, thinking: bool | None = None
    ) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn; see `ChatFormat.prompt`."""
        return self.chat_format.ids(messages, tools=tools, thinking=thinking)

    def warm_up(
        self, batch: int = 1, progress: bool | None = None, *, tokens: int = 512, draft: Literal["mtp"] | None = None
    ) -> None:
        """Call every kernel once in every bucket of step sizes, so that none compiles during a request, and capture the decode
        steps of up to `batch` sequences of at most `tokens` tokens each, drafting if asked, where the backend captures any.

        A generation that needs a larger cache than these tokens captures anew. progress: None shows it on a terminal.
        """
        self._needs_weights()
        check_options(draft=draft)
        for name, value in (("batch", batch), ("tokens", tokens)):
            if not is_integer(value) or value < 1:
                raise UsageError(f"{name} is {value!r}; expected a positive integer")
        if draft:
            self._needs_mtp("draft='mtp'")
        tokens = min(int(tokens), self.config.max_position_embeddings)
        warm_up(self, min(int(batch), MAX_BATCH), tokens, draft == "mtp", progress)

    def prompt_ids(self, prompt: Any) -> list[int]:
        """The token ids of a prompt, checked: in the vocabulary, and leaving room for at least one more."""
        self._needs_weights()
        ids = self._needs_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        return self._checked(ids, 1, room=1)

    def requests(
        self, prompts: Many[Any], options: Mapping[str, Any], salt: bytes = b"", seeds: Many[int | None] | None = None
    ) -> list[Request]:
        """Prompts with the options of `generate`, checked, as requests for the engine; those of one salt share what the cache
        knows of their beginnings. seeds: each prompt once with each."""
        sampling = check_options(**options)
        if sampling.draft:
            self._needs_mtp("draft='mtp'")
        self._check_sampling(sampling)
        eos = self._eos()
        first: Grammar | None = None
        if sampling.grammar is not None:
            if not eos:
                raise UsageError("a grammar needs an end-of-text token; this model has none")
            first = Grammar.of(self._needs_tokenizer(), *sampling.grammar, sorted(eos), self.config.vocab_size)
        found = []
        for prompt in prompts:
            tokens = self.prompt_ids(prompt)
            limit = min(sampling.max_new_tokens, self.config.max_position_embeddings - len(tokens))
            for seed in (options.get("seed"),) if seeds is None else seeds:
                chosen = secrets.randbits(63) if seed is None else signed(seed)
                grammar = first and first.another()
                found.append(Request(tokens, sampling, chosen, limit, eos, self.tokenizer, salt, grammar=grammar))
        return found

    def _check_sampling(self, sampling: Sampling) -> None:
        """What options need of this model."""
        if sampling.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; this model's folder has none")
        wrong = next((t for t, _ in sampling.logit_bias if t >= self.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"logit_bias: token id {wrong} is outside the vocabulary of {self.config.vocab_size}")

    def _eos(self) -> frozenset[int]:
        found = self.config.eos_token_id
        if not found and self.tokenizer is not None and self.tokenizer.eos is not None:
            found = (self.tokenizer.eos,)
        return frozenset(found)

    def prepare_grammars(self) -> None:
        """What a first request with a grammar would wait for, and others with it."""
        if self.tokenizer is not None and (eos := self._eos()):
            prepare(self.tokenizer, sorted(eos), self.config.vocab_size)

    def _needs_weights(self) -> None:
        if self.device.type == "meta":
            raise UsageError("this model is on device 'meta': it has shapes but no weights; load it on a real device")
        if os.getpid() != self._process and torch.get_num_threads() > 1:
            raise UsageError(
                "this process was forked from the one that loaded the model, without that one's threads, which kernels would "
                "wait for without end: start processes with multiprocessing's 'spawn', or load with threads=1"
            )

    def _checked(self, ids: Any, minimum: int, room: int = 0) -> list[int]:
        self._needs_weights()
        tokens = as_ids(ids)
        if len(tokens) < minimum:
            raise UsageError(f"{len(tokens)} tokens; at least {minimum} needed")
        limit = self.config.max_position_embeddings - room
        if len(tokens) > limit:
            raise UsageError(f"{len(tokens)} tokens; this model reads at most {limit}")
        wrong = next((t for t in tokens if not 0 <= t < self.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        return tokens

    def _needs_mtp(self, what: str) -> None:
        if not self._graph.mtp:
            raise UsageError(f"{what} needs an MTP module; this model was loaded without one")

    def _needs_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError("this model's folder has no tokenizer.json; give prompts as lists of token ids")
        return self.tokenizer

    def _out(self, logits: Tensor) -> Tensor:
        return logits.to("cpu", torch.float64 if self.dtype == torch.float64 else torch.float32)


def _prompts(prompts: Any) -> tuple[bool, list[Any]]:
    """Whether it is one prompt, and all of them."""
    if not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__") or isinstance(prompts, Mapping):
        raise UsageError(f"prompts is {prompts!r}; expected a string, a list of token ids, or a list of either")
    single = isinstance(prompts, str) or (len(prompts) > 0 and is_integer(prompts[0]))
    return single, [prompts] if single else list(prompts)


def _results(requests: Many[Request]) -> list[Generation]:
    if (error := failed(requests)) is not None:
        raise error
    return [r.result() for r in requests]


def _check_chunk(chunk: Any) -> None:
    if not is_integer(chunk) or chunk < 1:
        raise UsageError(f"chunk is {chunk!r}; expected a positive number of tokens")
