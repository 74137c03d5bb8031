"""Level 2: a whole model on the backend agrees with float64, on every path, as closely as the reference at the same formats."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dsv3.budget.units import BF16_OPERAND, TC14
from dsv3.conformance import tiny
from dsv3.conformance.data import Data
from dsv3.conformance.result import SIZES, Size
from dsv3.dispatch.choose import named
from dsv3.engine.cache import Run
from dsv3.loading import load_on

if TYPE_CHECKING:
    from dsv3.conformance.target import Target
    from dsv3.engine.model import Model
    from dsv3.plugin import KvDType, Quant

Answer = tuple[float, float, str] | str
Check = Callable[["Target", int], Answer]


@dataclass(frozen=True)
class Formats:
    """Number formats of a model, and the smallest size that tries them."""

    name: str
    dtype: str
    quant: Quant
    kv_dtype: KvDType | None = None
    size: Size = "small"


FORMATS = (
    Formats("f32", "float32", "none", size="quick"),
    Formats("bf16-fp8", "bfloat16", "fp8-w8a8", size="quick"),
    Formats("bf16", "bfloat16", "none"),
    Formats("f32-fp8w8a16", "float32", "fp8-w8a16"),
    Formats("f32-int8", "float32", "int8-w8a8"),
    Formats("bf16-int8", "bfloat16", "int8-w8a8"),
    Formats("f32-kv8", "float32", "none", "fp8"),
    Formats("bf16-fp8w8a16", "bfloat16", "fp8-w8a16", size="full"),
    Formats("bf16-int8w8a16", "bfloat16", "int8-w8a16", size="full"),
    Formats("bf16-int4", "bfloat16", "int4-w4a16", size="full"),
    Formats("bf16-kv8", "bfloat16", "fp8-w8a8", "fp8", size="full"),
    Formats("f64", "float64", "none", size="full"),
)
TOKENS = 80  # past the original context of the tiny model
# Relative error of a row of logits that no format is asked to be below: nor what one product of a declared class may err.
_CLASS = {"tc14": TC14, "bf16-operand": BF16_OPERAND, "bf16-p": BF16_OPERAND}
# Nor a step between two codes of an FP8 cache, where a tie may fall either way.
_CODES = 2.0**-7
_FLOOR = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 2e-3}
# A row may be further off than FACTOR times the reference's worst in 16 bits: another expert where two were as good.
_STRAY = 0.15
_LARGEST_TIE = 0.25
# One code of one activation that falls to its neighbour in an early layer moves all later rows, and may change an expert: on
# right backends medians up to 0.033 and worst rows of 0.18 were seen, 2 of 20 seeds, where the reference had no such flip.
_ACTIVATION_CODES = 2.0**-5
_NEAR_TIE = 30.0  # times the floor, relative to the largest logit: tokens this close may swap
FACTOR = 4.0
MEDIAN_FACTOR = 2.5  # the median row scatters less than the worst


class Runs:
    """The model of one format on the backend, on the reference, and on the reference in float64."""

    def __init__(self, target: Target, formats: Formats, seed: int) -> None:
        self.formats, self.target = formats, target
        with tempfile.TemporaryDirectory() as folder:
            path = str(tiny.write(Path(folder), seed))
            reference = named("reference", "cpu", None)
            how: dict[str, Any] = {"quant": formats.quant, "kv_dtype": formats.kv_dtype}
            self.model = load_on(target.source, path, dtype=formats.dtype, **how)
            self.plain = load_on(reference, path, dtype=formats.dtype, **how)
            self.exact = load_on(reference, path, dtype="float64", **how)
        self.ids = Data("tiny-ids", seed).integers("ids", 2, tiny.CONFIG["vocab_size"], TOKENS).tolist()

    @property
    def unused(self) -> str:
        """Why the format says nothing about the backend; "" if it does."""
        placement = self.model.placement()
        wanted = self.formats.kv_dtype
        if wanted and placement.kv_dtype != wanted:
            return f"the backend keeps its cache in {placement.kv_dtype}"
        native = [d for _, _, d in placement.decisions() if d.kernel and d.kernel.source.name == self.target.name]
        return "" if native else f"no kernel of the backend takes a call of a model in {self.formats.name}"

    @functools.cached_property
    def floor(self) -> float:
        """Relative error of a row of logits that is as good as none, at these formats and with the classes that the backend's
        kernels declare."""
        decisions = [d.kernel.kernel.numerics for _, _, d in self.model.placement().decisions() if d.kernel]
        declared = 0.0 if self.formats.dtype == "float64" else max((_CLASS.get(n, 0.0) for n in decisions), default=0.0)
        coded = 0.0
        if self.formats.dtype == "float32":
            coded = (
                _ACTIVATION_CODES if self.formats.quant.endswith("a8") else _CODES if self.formats.kv_dtype == "fp8" else 0.0
            )
        return max(_FLOOR[self.formats.dtype], declared, coded)

    @property
    def tie(self) -> float:
        """The floor where two tokens are compared. A flipped code counts in bfloat16 as well: two right ways through the same
        model, on a CPU with other vector units, chose tokens whose logits differ by 0.068 of the largest."""
        return max(self.floor, _ACTIVATION_CODES if self.formats.quant.endswith("a8") else 0.0)

    @functools.cached_property
    def truth(self) -> Tensor:
        return self.exact.logits(self.ids)

    @functools.cached_property
    def mtp_truth(self) -> Tensor:
        return self.exact.mtp_logits(self.ids)


@functools.lru_cache(maxsize=2)
def runs(target: Target, formats: Formats, seed: int) -> Runs:
    """Made once for all cases of a format."""
    return Runs(target, formats, seed)


def row_errors(found: Tensor, truth: Tensor) -> Tensor:
    """Relative error of each row, in the 2-norm."""
    found, truth = found.to(torch.float64), truth.to(torch.float64)
    error = (found - truth).norm(dim=-1) / truth.norm(dim=-1)
    return torch.where(torch.isnan(error), torch.full_like(error, math.inf), error)


def compare(found: Tensor, plain: Tensor, truth: Tensor, floor: float) -> tuple[float, float, str]:
    """Margin of the median row and of the worst ones, against FACTOR times what the reference errs at the same formats, or the
    floor of these."""
    if found.shape != truth.shape:
        return math.inf, 0.0, f"logits have shape {list(found.shape)}; expected {list(truth.shape)}"
    own, reference = row_errors(found, truth).sort().values, row_errors(plain, truth).sort().values
    last = len(own) - 1 - (int(_STRAY * len(own)) if floor >= _FLOOR["bfloat16"] else 0)
    ratios = []
    for at, factor in ((len(own) // 2, MEDIAN_FACTOR), (last, 2 * FACTOR if floor >= _ACTIVATION_CODES else FACTOR)):
        ratios.append(float(own[at]) / (factor * max(float(reference[at]), floor)))
    stray = float(own[-1]) / max(1.0, FACTOR * float(reference[-1]))
    margin = max(*ratios, stray)
    nmse = float((found.double() - truth).square().sum() / truth.square().sum())
    if margin <= 1:
        return margin, nmse, ""
    worst = int(row_errors(found, truth).argmax())
    middle = len(own) // 2
    text = (
        f"logits are off by {float(own[middle]):.3g} (median row) and {float(own[last]):.3g} (worst, row {worst}) relative to "
        f"float64; the reference at these formats by {float(reference[middle]):.3g} and {float(reference[last]):.3g}"
    )
    return margin, nmse, text


def _logits(how: dict[str, Any]) -> Callable[[Runs], Answer]:
    def check(r: Runs) -> Answer:
        return compare(r.model.logits(r.ids, **how), r.plain.logits(r.ids, **how), r.truth, r.floor)

    return check


def _decode(r: Runs) -> Answer:
    """A prompt at once, expanded; then token by token, absorbed, over the cache that the prompt left."""
    split = TOKENS - 14

    def rows(model: Model) -> Tensor:
        cache = model.new_cache([TOKENS])
        model.forward(cache, [Run(0, r.ids[:split], 0)], False)
        made = [model.head(model.forward(cache, [Run(0, [r.ids[i]], i)], True)[0]) for i in range(split, TOKENS)]
        return torch.cat(made).to("cpu", torch.float64)

    return compare(rows(r.model), rows(r.plain), r.truth[split:], r.floor)


def _mtp_logits(r: Runs) -> Answer:
    found, plain = (m.mtp_logits(r.ids, chunk=16) for m in (r.model, r.plain))
    return compare(found, plain, r.mtp_truth, r.floor)


def _greedy_mtp(r: Runs) -> Answer:
    """Drafts change no token, but where two logits are as good as equal."""
    options: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True}
    plain = r.model.generate(r.ids[:20], **options).ids
    drafted = r.model.generate(r.ids[:20], draft="mtp", **options).ids
    return same_text(r.model, r.ids[:20], plain, drafted, r.tie, "with MTP drafts")


def _batch(draft: Literal["mtp"] | None) -> Callable[[Runs], Answer]:
    """Three prompts together give what each gives alone, without drafts."""

    def check(r: Runs) -> Answer:
        prompts = [r.ids[:5], r.ids[10:40], r.ids[50:51]]
        options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
        together = r.model.generate(prompts, draft=draft, **options)
        for prompt, found in zip(prompts, together, strict=True):
            alone = r.model.generate(prompt, **options).ids
            answer = same_text(r.model, prompt, alone, found.ids, r.tie, "in a batch")
            if isinstance(answer, str) or answer[2]:
                return answer
        return 0.0, 0.0, ""

    return check


def same_text(model: Model, prompt: list[int], one: list[int], other: list[int], floor: float, what: str) -> Answer:
    """Equal tokens up to the first place where the two chosen have logits that rounding could swap."""
    for at, (a, b) in enumerate(zip(one, other, strict=True)):
        if a == b:
            continue
        row = model.logits([*prompt, *one[:at]])[-1].double()
        gap = float((row[a] - row[b]).abs())
        slack = min(_NEAR_TIE * floor, _LARGEST_TIE) * float(row.abs().max())
        if gap > slack:
            text = f"{what}, token {at} is {b} instead of {a}, though their logits differ by {gap:.3g} (near tie: {slack:.3g})"
            return math.inf, 0.0, text
        break
    return 0.0, 0.0, ""


CHECKS: tuple[tuple[str, Callable[[Runs], Answer]], ...] = (
    ("prefill", _logits({})),
    ("chunked", _logits({"chunk": 17})),
    ("absorbed", _logits({"absorbed": True, "chunk": 33})),
    ("decode", _decode),
    ("mtp-logits", _mtp_logits),
    ("mtp-greedy", _greedy_mtp),
    ("batch", _batch(None)),
    ("mtp-batch", _batch("mtp")),
)


def _bound(formats: Formats, check: Callable[[Runs], Answer]) -> Check:
    def answer(target: Target, seed: int) -> Answer:
        if formats.dtype not in target.source.capability.dtypes:
            return f"the device does not list {formats.dtype}"
        if formats.kv_dtype and not target.keeps(formats.kv_dtype):
            return f"the backend keeps no {formats.kv_dtype.upper()} cache"
        made = runs(target, formats, seed)
        return made.unused or check(made)

    return answer


def formats_of(size: Size) -> Iterator[Formats]:
    """Those that a size tries."""
    return (f for f in FORMATS if SIZES.index(f.size) <= SIZES.index(size))


def model_cases(size: Size) -> Iterable[tuple[str, Check]]:
    """(id, check) of level 2."""
    return [(f"l2/{f.name}/{name}", _bound(f, check)) for f in formats_of(size) for name, check in CHECKS]


def model_ids(size: Size) -> list[str]:
    """The ids of level 2."""
    return [case for case, _ in model_cases(size)]
