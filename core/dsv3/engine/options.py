"""How a continuation is asked for, checked. No torch: the command line checks before it loads anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

from dsv3.errors import UsageError

MAX_BATCH = 32  # sequences generated together
MAX_DRAFTS = 8
MAX_LOGPROBS = 20
MAX_BIASES = 1024


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; the noise depends on seed and position only.

    Applied to the logits in this order: bias; repetition penalty (Keskar et al. 2019), presence and frequency penalty, over
    prompt and new tokens, and new tokens alone; grammar; temperature; top_k, top_p (Holtzman et al. 2020), min_p.
    verify: how drafts are accepted, "coupled" (the draft and the model share their noise; a draft is accepted if the model
    chooses it too) or "rejection" (Leviathan et al. 2023). logprobs: how many of the likeliest tokens are given with each;
    prompt_logprobs: with each of the prompt's own, of which none is taken from the cache then.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    draft: str | None = None
    draft_tokens: int = 1
    adaptive: bool = True
    verify: str = "coupled"
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: tuple[str, str] | None = None  # (kind, text), see `grammar.py`

    @property
    def penalised(self) -> bool:
        """Whether what was said before changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncated(self) -> bool:
        """Whether unlikely tokens are ruled out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


# Name: (lowest, whether that is excluded, highest), of numbers.
_RANGES: dict[str, tuple[float, bool, float]] = {
    "temperature": (0, False, math.inf),
    "top_p": (0, True, 1),
    "min_p": (0, False, 1),
    "repetition_penalty": (0, True, 100),
    "presence_penalty": (-2, False, 2),
    "frequency_penalty": (-2, False, 2),
}


def check_options(**options: Any) -> Sampling:
    """The options of `Model.generate`: `Sampling`'s, and a seed. UsageError names the one that is wrong."""
    given = {**_DEFAULTS, **options}
    if given["seed"] is not None and not is_integer(given["seed"]):
        _wrong("seed", given["seed"], "an integer")
    del given["seed"]
    for name, (lowest, open_, highest) in _RANGES.items():
        _check_number(name, given[name], lowest, open_, highest)
        given[name] = float(given[name])
    for name, least, most in (
        ("max_new_tokens", 0, None), ("top_k", 0, None), ("draft_tokens", 1, MAX_DRAFTS), ("logprobs", 0, MAX_LOGPROBS),
        ("prompt_logprobs", 0, MAX_LOGPROBS),
    ):  # fmt: skip
        given[name] = _checked_integer(name, given[name], least, most, "logprobs" in name)
    for name, allowed in (("draft", (None, "mtp")), ("verify", ("coupled", "rejection"))):
        if given[name] not in allowed:
            _wrong(name, given[name], " or ".join("nothing" if a is None else repr(a) for a in reversed(allowed)))
    given["stop"] = _stops(given["stop"])
    given["logit_bias"] = _biases(given["logit_bias"])
    given["grammar"] = _grammar(given["grammar"], bool(given["ignore_eos"]))
    given["ignore_eos"], given["adaptive"] = bool(given["ignore_eos"]), bool(given["adaptive"])
    unknown = given.keys() - Sampling.__dataclass_fields__.keys()
    if unknown:
        raise UsageError(f"{sorted(unknown)[0]!r} is no option of a generation; there are {', '.join(sorted(_DEFAULTS))}")
    return Sampling(**given)


_DEFAULTS: dict[str, Any] = {name: f.default for name, f in Sampling.__dataclass_fields__.items()} | {"seed": None}


def _wrong(name: str, value: Any, expected: str) -> NoReturn:
    raise UsageError(f"{name} is {value!r}; expected {expected}")


def _check_number(name: str, value: Any, lowest: float, open_: bool, highest: float) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)  # NumPy's are such too
    inside = number and math.isfinite(value) and (lowest < value if open_ else lowest <= value) and value <= highest
    if not inside:
        above = f"above {lowest:g}" if open_ else f"of at least {lowest:g}"
        _wrong(name, value, f"a finite number {above}" + ("" if highest == math.inf else f" and at most {highest:g}"))


def _checked_integer(name: str, value: Any, least: int, most: int | None, optional: bool) -> int | None:
    if value is None and optional:
        return None
    if not is_integer(value) or value < least or (most is not None and value > most):
        if most is not None:
            _wrong(name, value, f"an integer from {least} to {most}")
        _wrong(name, value, "a non-negative integer" if least == 0 else f"an integer of at least {least}")
    return int(value)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (None,)
    if not all(isinstance(s, str) and s for s in stops):
        _wrong("stop", stop, "strings that are not empty")
    return stops


def _biases(biases: Any) -> tuple[tuple[int, float], ...]:
    """{token id: number added to its logit}."""
    try:
        found = [(token, value) for token, value in (biases.items() if isinstance(biases, Mapping) else biases)]
    except (TypeError, ValueError):
        _wrong("logit_bias", biases, "a mapping of token ids to numbers")
    if len(found) > MAX_BIASES:
        raise UsageError(f"logit_bias has {len(found)} entries; at most {MAX_BIASES} are taken")
    for token, value in found:
        good = is_integer(token) and token >= 0 and isinstance(value, Real) and -100 <= float(value) <= 100
        if not good:
            _wrong("logit_bias", (token, value), "token ids and numbers from -100 to 100")
    return tuple((int(token), float(value)) for token, value in found)


def _grammar(grammar: Any, ignore_eos: bool) -> tuple[str, str] | None:
    if grammar is None:
        return None
    kinds = ("json_schema", "json_object", "regex", "lark")
    pair = isinstance(grammar, tuple | list) and len(grammar) == 2 and all(isinstance(part, str) for part in grammar)
    if not pair or grammar[0] not in kinds:
        _wrong("grammar", grammar, f"(kind, text), the kind one of {', '.join(kinds)}")
    if ignore_eos:
        raise UsageError("a grammar ends with eos; it cannot be combined with ignore_eos")
    return grammar[0], grammar[1]


def is_integer(value: Any) -> bool:
    """An integer of Python, NumPy or torch (a tensor without dimensions); a bool is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return False
    shape = getattr(value, "shape", ())
    try:
        value.__index__()
    except TypeError:  # a float or bool tensor
        return False
    return len(shape) == 0 and "bool" not in str(getattr(value, "dtype", ""))
