"""A model's arithmetic: caches, steps, logits, draws, each by the kernels bound to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dsv3.engine.cache import BatchCache, PagedCache, Run
from dsv3.engine.graphs import DecodeGraphs, Size
from dsv3.engine.sample import Row, processed
from dsv3.graph.config import ModelConfig
from dsv3.graph.transformer import Transformer
from dsv3.plugin import CacheSpec

if TYPE_CHECKING:
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


class Executor:
    """What the engine calls. Each method enters inference mode for itself: a generator that yields inside the mode would leave
    it on in its caller's code."""

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
        self.device, self.dtype = device, dtype
        self._graph, self._sample, self._placement = graph, sample, placement
        self._cache_spec, self._source = cache_spec, source
        self.graphs = DecodeGraphs(graph, placement, source, decode_path, device, graphs)

    def placement(self) -> Placement:
        """Every binding decision with every rejected candidate and its reason."""
        return self._placement

    @property
    def graph(self) -> Transformer:
        """The graph with its call sites, for measurements and exports."""
        return self._graph

    @torch.inference_mode()
    def new_cache(self, lengths: Many[int]) -> BatchCache:
        """A latent cache for sequences of at most these lengths, MTP modules included."""
        layers = len(self._graph.blocks) + len(self._graph.mtp)
        return BatchCache(self.config, layers, self._cache_spec, self.dtype, self.device, lengths)

    @property
    def page_size(self) -> int:
        """Tokens to a page of the cache."""
        return self._cache_spec.page_size

    @property
    def cache_bytes_per_token(self) -> int:
        """Of all layers' latents, MTP modules included."""
        page = self.paged_cache(1)
        planes = [plane for layer in page.layers for plane in (layer.ckv, layer.kpe, layer.scale) if plane is not None]
        return max(1, sum(plane.nbytes for plane in planes) // self.page_size)

    @torch.inference_mode()
    def paged_cache(self, pages: int) -> PagedCache:
        """A latent cache of so many pages that belong to nobody yet, MTP modules included."""
        layers = len(self._graph.blocks) + len(self._graph.mtp)
        return PagedCache(self.config, layers, self._cache_spec, self.dtype, self.device, pages)

    @torch.inference_mode()
    @_blaming
    def decode(self, cache: PagedCache, runs: Many[Run]) -> tuple[Tensor, Tensor, Tensor | None]:
        """A decode step, by replay where that can be: what `forward` gives, and then also the logits [T, V], in memory that the
        next step overwrites; None where it ran eagerly."""
        if (replayed := self.graphs.run(cache, runs)) is not None:
            return replayed
        return *self.forward(cache, runs, True), None

    @torch.inference_mode()
    def capture(self, cache: PagedCache, size: Size) -> bool:
        """Capture decode steps of a size over the cache, if there is no graph of them yet; False where there can be none."""
        return self.graphs.captured(cache, size) is not None

    @torch.inference_mode()
    @_blaming
    def forward(self, cache: PagedCache, runs: Many[Run], absorbed: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [T, H] of all tokens of the runs, and what an MTP module takes."""
        step = cache.step(runs, self._placement.binding.bucket, absorbed)
        return self._graph.forward(step, cache.layers)

    @torch.inference_mode()
    @_blaming
    def mtp_forward(self, cache: PagedCache, runs: Many[Run], states: Tensor, absorbed: bool) -> Tensor:
        """Hidden states [T, H] of the first MTP module; runs hold the tokens after those of `states`, at their own
        positions."""
        step = cache.step(runs, self._placement.binding.bucket, absorbed, start=1)
        return self._graph.mtp_forward(step, states, cache.layers)

    @torch.inference_mode()
    @_blaming
    def forward_mixed(self, cache: PagedCache, few: Many[Run], many: Many[Run]) -> tuple[Tensor, Tensor]:
        """`forward` of runs that attend absorbed, and after them of others, as one step."""
        step = cache.mixed(few, many, self._placement.binding.bucket)
        return self._graph.forward(step, cache.layers)

    @torch.inference_mode()
    @_blaming
    def mtp_mixed(self, cache: PagedCache, few: Many[Run], many: Many[Run], states: Tensor) -> Tensor:
        """`mtp_forward`, likewise; by replay where that can be, into memory that the next such step overwrites."""
        if not many and (replayed := self.graphs.draft(cache, few, states)) is not None:
            return replayed
        step = cache.mixed(few, many, self._placement.binding.bucket, start=1)
        return self._graph.mtp_forward(step, states, cache.layers)

    @torch.inference_mode()
    @_blaming
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] in the model's dtype."""
        return self._graph.logits(hidden, self._placement.binding.bucket(hidden.shape[0]))

    @torch.inference_mode()
    @_blaming
    def choose(self, logits: Tensor, rows: Many[Row]) -> tuple[Tensor, list[int]]:
        """Logits under the rules of the rows' requests, and one token drawn from each row."""
        final = processed(logits, rows)
        owners = [row.request for row in rows]
        ids = self.draw(
            final, [r.seed for r in owners], [row.position for row in rows], [r.sampling.temperature for r in owners]
        )
        return final, [int(i) for i in ids.tolist()]

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
