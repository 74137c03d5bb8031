"""A loaded model as a library object."""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from dsv3.engine.cache import BatchCache, Run
from dsv3.engine.generate import PREFILL_TOKENS, generate
from dsv3.engine.graphs import DecodeGraphs, Size
from dsv3.engine.options import MAX_BATCH, Sampling, check_options, is_integer
from dsv3.engine.sequence import Generation, Sequence, as_ids
from dsv3.engine.text import Tokenizer
from dsv3.engine.warmup import warm_up
from dsv3.errors import Dsv3Error, UsageError
from dsv3.graph.config import ModelConfig
from dsv3.graph.transformer import Transformer
from dsv3.graph.weights import walk
from dsv3.plugin import CacheSpec, Prepared

if TYPE_CHECKING:
    from dsv3.dispatch.check import CheckReport
    from dsv3.dispatch.choose import Source
    from dsv3.dispatch.placement import Placement

P = ParamSpec("P")
R = TypeVar("R")


def _blaming(method: Callable[P, R]) -> Callable[P, R]:
    """An error that a bound kernel raises names the kernel, the operator and the site."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (Exception, SystemExit) as error:
            model: Any = args[0]
            named = model.placement().binding.blame(error)
            if named is error:
                raise
            raise named from error

    return call


class Model:
    """What `dsv3.load` returns. config: ModelConfig. tokenizer: `.encode(text)`, `.decode(ids)`, or None."""

    def __init__(
        self,
        config: ModelConfig,
        graph: Transformer,
        sample: Any,
        placement: Placement,
        cache_spec: CacheSpec,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        decode_path: frozenset[tuple[str, str]] = frozenset(),
        graphs: bool | None = None,
    ) -> None:
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.device, self.dtype = device, dtype
        self._graph, self._sample, self._placement = graph, sample, placement
        self._cache_spec, self._source = cache_spec, source
        self.graphs = DecodeGraphs(graph, placement, source, decode_path, device, graphs)
        self._lock = threading.Lock()
        self._kept: BatchCache | None = None

    def __repr__(self) -> str:
        return f"<dsv3.Model {self._placement.summary}>"

    # -- what users call

    def placement(self) -> Placement:
        """Every binding decision with every rejected candidate and its reason."""
        return self._placement

    def check_report(self) -> CheckReport | None:
        """What `load(check=True)`, or DSV3_CHECK=1, has found so far; None without it."""
        checker = self._placement.binding.checker
        return None if checker is None else checker.report

    @property
    def graph(self) -> Transformer:
        """The graph with its call sites, for measurements and exports."""
        return self._graph

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
    ) -> Any:
        """Continue prompts. A str (encoded with BOS) or a list of ids (taken as they are) gives a Generation; a list
        of either a list of them, in order. draft "mtp": guess with the MTP module and verify; the tokens are the
        same, in fewer steps."""
        if not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__"):
            raise UsageError(f"prompts is {prompts!r}; expected a string, a list of token ids, or a list of either")
        single = isinstance(prompts, str) or (len(prompts) > 0 and is_integer(prompts[0]))
        many = [prompts] if single else list(prompts)
        sampling = check_options(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop,
            ignore_eos=ignore_eos, draft=draft,
        )  # fmt: skip
        sequences = [self._sequence(p, sampling, seed) for p in many]
        for _ in self._events(sequences, draft):
            pass
        results = [s.result() for s in sequences]
        return results[0] if single else results

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """The text of `generate(prompt, ...)` piece by piece; the pieces join to its text. Wrong arguments raise at once."""
        return (piece for piece, _ in self.stream_events(prompt, **options))

    def stream_events(self, prompt: Any, **options: Any) -> Iterator[tuple[str, Generation | None]]:
        """(text piece, None) as it appears, at last ("", Generation)."""
        sampling = check_options(**options)
        sequence = self._sequence(prompt, sampling, options.get("seed"))
        events = self._events([sequence], options.get("draft"))

        def pieces() -> Iterator[tuple[str, Generation | None]]:
            for _, piece in events:
                yield piece, None
            yield "", sequence.result()

        return pieces()

    def chat(self, messages: Many[Mapping[str, str]], **options: Any) -> Generation:
        """Answer a conversation of {"role", "content"} messages, through the model's chat template."""
        result: Generation = self.generate(self.chat_ids(messages), **options)
        return result

    def chat_ids(self, messages: Many[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn."""
        tokenizer = self._needs_tokenizer()
        if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
            raise UsageError(f'{messages!r} is no list of {{"role": ..., "content": ...}} messages')
        return tokenizer.encode_plain(tokenizer.render(messages))

    # -- what the generation loop calls. Each enters inference mode for itself: a generator that yields inside the mode
    # would leave it on in its caller's code.

    @torch.inference_mode()
    def new_cache(self, lengths: Many[int]) -> BatchCache:
        """A latent cache for sequences of at most these lengths, MTP modules included."""
        layers = len(self._graph.blocks) + len(self._graph.mtp)
        return BatchCache(self.config, layers, self._cache_spec, self.dtype, self.device, lengths)

    def lease_cache(self, lengths: Many[int]) -> BatchCache:
        """A cache to generate in, to be given back. Where decode steps are captured it is the last one if that has room, for
        graphs hold for the memory they were captured over."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None and kept.assign(lengths):
            return kept
        del kept  # before the larger one is made
        return self.new_cache(lengths)

    def give_back(self, cache: BatchCache) -> None:
        """Keep a leased cache for the next who asks if steps were captured over it; of two the larger."""
        with self._lock:
            if cache.captured and (self._kept is None or self._kept.total < cache.total):
                self._kept = cache

    @torch.inference_mode()
    @_blaming
    def decode(self, cache: BatchCache, runs: Many[Run]) -> tuple[Tensor, Tensor, Tensor | None]:
        """A decode step, by replay where that can be: what `forward` gives, and then also the logits [T, V], in memory that the
        next step overwrites; None where it ran eagerly."""
        if (replayed := self.graphs.run(cache, runs)) is not None:
            return replayed
        return *self.forward(cache, runs, True), None

    @torch.inference_mode()
    def capture(self, cache: BatchCache, size: Size) -> bool:
        """Capture decode steps of a size over the cache, if there is no graph of them yet; False where there can be none."""
        return self.graphs.captured(cache, size) is not None

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

    @torch.inference_mode()
    @_blaming
    def forward(self, cache: BatchCache, runs: Many[Run], absorbed: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [T, H] of all tokens of the runs, and what an MTP module takes."""
        step = cache.step(runs, self._placement.binding.bucket, absorbed)
        return self._graph.forward(step, cache.layers)

    @torch.inference_mode()
    @_blaming
    def mtp_forward(self, cache: BatchCache, runs: Many[Run], states: Tensor, absorbed: bool) -> Tensor:
        """Hidden states [T, H] of the first MTP module; runs hold the tokens after those of `states`, at their own
        positions."""
        step = cache.step(runs, self._placement.binding.bucket, absorbed, start=1)
        return self._graph.mtp_forward(step, states, cache.layers)

    @torch.inference_mode()
    @_blaming
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] in the model's dtype."""
        return self._graph.logits(hidden, self._placement.binding.bucket(hidden.shape[0]))

    @torch.inference_mode()
    @_blaming
    def sample(self, logits: Tensor, owners: Many[Sequence], positions: Many[int]) -> list[int]:
        """One token per row, for the sequence that owns it, at the position it will have."""
        rows = torch.isnan(logits).any(dim=-1)
        if bool(rows.any()):
            raise Dsv3Error(
                "the model produced NaN logits: a damaged checkpoint, or a kernel at fault; try --backend reference, "
                "or --dtype float32"
            )
        temperatures = [s.sampling.temperature for s in owners]
        top_ps = [s.sampling.top_p if s.sampling.temperature > 0 else 1.0 for s in owners]
        device = logits.device
        if any(p < 1 for p in top_ps):
            logits = _nucleus(logits, torch.tensor(temperatures, device=device), torch.tensor(top_ps, device=device))
        ids = self.draw(logits, [s.seed for s in owners], positions, temperatures)
        return [int(i) for i in ids.tolist()]

    @torch.inference_mode()
    @_blaming
    def draw(self, logits: Tensor, seeds: Many[int], positions: Many[int], temperatures: Many[float]) -> Tensor:
        """ids [T] by the bound sampler."""
        device = logits.device
        bucket = self._placement.binding.bucket(logits.shape[0])
        ids: Tensor = self._sample[bucket](
            logits=logits,
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            temperature=torch.tensor(temperatures, dtype=torch.float32, device=device),
        )
        return ids

    # -- inside

    def _events(self, sequences: list[Sequence], draft: str | None) -> Iterator[tuple[Sequence, str]]:
        if draft:
            self._needs_mtp("draft='mtp'")
        return generate(self, sequences, draft == "mtp")

    def prompt_ids(self, prompt: Any) -> list[int]:
        """The token ids of a prompt, checked: in the vocabulary, and leaving room for at least one more."""
        self._needs_weights()
        ids = self._needs_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        return self._checked(ids, 1, room=1)

    def _sequence(self, prompt: Any, sampling: Sampling, seed: int | None) -> Sequence:
        tokens = self.prompt_ids(prompt)
        if sampling.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer; this model's folder has none")
        eos = set(self.config.eos_token_id)
        if not eos and self.tokenizer is not None and self.tokenizer.eos is not None:
            eos = {self.tokenizer.eos}
        chosen = secrets.randbits(63) if seed is None else _signed(seed)
        limit = min(sampling.max_new_tokens, self.config.max_position_embeddings - len(tokens))
        return Sequence(tokens, sampling, chosen, limit, frozenset(eos), self.tokenizer)

    def _needs_weights(self) -> None:
        if self.device.type == "meta":
            raise UsageError("this model is on device 'meta': it has shapes but no weights; load it on a real device")

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


def _check_chunk(chunk: Any) -> None:
    if not is_integer(chunk) or chunk < 1:
        raise UsageError(f"chunk is {chunk!r}; expected a positive number of tokens")


def _signed(seed: int) -> int:
    """Any integer as the signed 64 bits that a tensor holds."""
    low = int(seed) & (1 << 64) - 1
    return low - (1 << 64) if low >> 63 else low


def _nucleus(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Logits with all but the smallest set of tokens whose probabilities sum to top_p at -inf (Holtzman et al. 2020)."""
    scaled = logits.to(torch.float64) / temperature.clamp_min(1e-6)[:, None]
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    before = torch.softmax(ordered, dim=-1).cumsum(dim=-1) - torch.softmax(ordered, dim=-1)
    drop = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p[:, None])
    return logits.masked_fill(drop & (top_p < 1)[:, None], float("-inf"))
