"""A step of the scheduler on the model: its tokens through the graph, tokens chosen, drafts verified, new drafts guessed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv3.engine.cache import PagedCache, Run
from dsv3.engine.request import Request, Status, TokenLogprobs
from dsv3.engine.sample import Row, accepted, logprobs_of
from dsv3.engine.scheduler import Work
from dsv3.errors import Dsv3Error

if TYPE_CHECKING:
    from dsv3.engine.executor import Executor

_RATED = 256  # rows of logits at a time, where those of a whole prompt are wanted
FEW = 16  # tokens of a request up to which it attends over the latent cache as it is
NAN = "the model produced NaN logits: a damaged checkpoint, or a kernel at fault; try --backend reference, or --dtype float32"


@dataclass
class Choice:
    """What was chosen after a work's last rows: its accepted drafts, and one token more; those log probabilities of the
    prompt's tokens that are wanted."""

    work: Work
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt: list[TokenLogprobs | None] = field(default_factory=list)
    error: Dsv3Error | None = None


@dataclass
class Computed:
    """A step's works in the order of its rows, first the `few` that attend over the cache as it is; the hidden states that an
    MTP module takes [T, H], and what was chosen."""

    works: list[Work]
    few: int
    states: Tensor
    choices: list[Choice]


class Runner:
    def __init__(self, model: Executor) -> None:
        self._model = model

    def run(self, cache: PagedCache, plan: list[Work]) -> Computed:
        """Compute a step. What requests know is not changed by it, so that a step that fails can be computed again."""
        few = [w for w in plan if len(w.ids) <= FEW and w.start]
        many = [w for w in plan if len(w.ids) > FEW or not w.start]
        works = few + many
        runs = [[Run(w.request.row, w.ids, w.start, w.unwritten) for w in part] for part in (few, many)]
        logits: Tensor | None = None
        if many or any(w.unwritten or w.rows != len(w.ids) for w in few):
            hidden, states = self._model.forward_mixed(cache, *runs)
        else:
            hidden, states, logits = self._model.decode(cache, runs[0])
        for w in works:
            w.request.steps += w.rows > 0
            w.request.graph_steps += w.rows > 0 and logits is not None
        choices = self._choose(works, hidden, logits)
        self._rate(choices, hidden)
        return Computed(works, len(few), states, choices)

    def _rate(self, choices: list[Choice], hidden: Tensor) -> None:
        """Log probabilities of the prompt's tokens, each by the row of the token before it."""
        at = 0
        for choice in choices:
            w, r = choice.work, choice.work.request
            first, last = len(r.prompt_logprobs) - 1, min(w.start + len(w.ids), len(r.prompt) - 1)
            if r.rates_prompt and choice.error is None:
                for begin in range(first, last, _RATED):
                    end = min(begin + _RATED, last)
                    logits = self._model.head(hidden[at + begin - w.start : at + end - w.start])
                    if bool(logits.isnan().any()):
                        choice.error = Dsv3Error(NAN)
                        break
                    counts = [r.sampling.prompt_logprobs] * (end - begin)
                    choice.prompt += logprobs_of(logits, r.prompt[begin + 1 : end + 1], counts)
            at += len(w.ids)

    def _choose(self, works: list[Work], hidden: Tensor, logits: Tensor | None) -> list[Choice]:
        choices = [Choice(w) for w in works]
        picked: list[int] = []
        rows: list[Row] = []
        at = 0
        for choice, w in zip(choices, works, strict=True):
            at += len(w.ids)
            r, drafts = w.request, w.ids[len(w.ids) - w.drafts :]
            try:
                masks = r.grammar.masks(drafts) if r.grammar is not None and w.rows else None
            except Dsv3Error as error:  # its own fault, and no reason to end others
                choice.error = error
                continue
            for n in range(w.rows if masks is None else len(masks)):
                picked.append(at - w.rows + n)
                rows.append(Row(r, drafts[:n], len(r.tokens) + n, None if masks is None else masks[n]))
        if not rows:
            return choices
        raw = self._model.head(_rows(hidden, picked)) if logits is None else _rows(logits, picked)
        bad = {rows[n].request for n, most in enumerate(raw.amax(dim=-1).tolist()) if most != most}
        if bad:
            raw = torch.nan_to_num(raw)
        final, ids = self._model.choose(raw, rows)
        found = logprobs_of(raw, ids, [row.request.sampling.logprobs for row in rows])
        first = 0
        for choice in choices:
            r = choice.work.request
            count = sum(row.request is r for row in rows[first : first + choice.work.rows])
            span = range(first, first + count)
            first += count
            if r in bad:
                choice.error = Dsv3Error(NAN)
            elif count:
                self._verify(choice, final, raw, ids, found, span)
        return choices

    def _verify(
        self, choice: Choice, final: Tensor, raw: Tensor, ids: list[int], found: list[TokenLogprobs | None], span: range
    ) -> None:
        """Tokens up to the first that is not the draft of its place."""
        w, r = choice.work, choice.work.request
        drafts = w.ids[len(w.ids) - w.drafts :]
        r.drafted += len(drafts)
        for n, row in enumerate(span):
            token, logprobs = ids[row], found[row]
            if n < len(drafts) and r.sampling.verify == "rejection":
                instead = accepted(final[row], r.draft_logits[n], drafts[n], r, len(r.tokens) + n)
                token = drafts[n] if instead is None else instead
                logprobs = logprobs_of(raw[row : row + 1], [token], [r.sampling.logprobs])[0]
            choice.tokens.append(token)
            choice.logprobs.append(logprobs)
            if n >= len(drafts) or token != drafts[n]:
                break
            r.accepted += 1

    # -- drafts

    def draft(self, cache: PagedCache, done: Computed) -> None:
        """Feed the MTP module every token that was accepted, and let it guess the next ones.

        Its row for a token takes the hidden state of the position before, and its entry lives at the token's own position.
        """
        runs: tuple[list[Run], list[Run]] = ([], [])
        picked: list[int] = []
        last: list[tuple[Request, int]] = []
        at = 0
        for n, (choice, w) in enumerate(zip(done.choices, done.works, strict=True)):
            first, r = at, w.request
            at += len(w.ids)
            count = min(r.computed, len(r.tokens) - 1) - w.start
            if not r.drafting or r.status is not Status.RUNNING or count <= 0:
                continue
            r.drafts, r.draft_logits = [], None
            ids, unwritten = r.tokens[w.start + 1 : w.start + 1 + count], max(0, min(r.filled - w.start - 1, count))
            runs[n >= done.few].append(Run(r.row, ids, w.start + 1, unwritten))
            picked += range(first, first + count)
            r.filled = max(r.filled, w.start + 1 + count)
            if choice.tokens:
                _adapt(r, len(choice.tokens) - 1, w.drafts)
                if _wanted(r):
                    last.append((r, len(picked) - 1))
        if not picked:
            return
        hidden = self._model.mtp_mixed(cache, *runs, _rows(done.states, picked))
        guessing = [r for r, _ in last]
        if not guessing:
            return
        hidden = _rows(hidden, [row for _, row in last])
        self._guess(guessing, hidden)
        while True:
            more = [n for n, r in enumerate(guessing) if len(r.drafts) < _wanted(r)]
            if not more:
                return
            guessing = [guessing[n] for n in more]
            hidden = _rows(hidden, more)
            again = [Run(r.row, r.drafts[-1:], len(r.tokens) + len(r.drafts) - 1) for r in guessing]
            hidden = self._model.mtp_mixed(cache, again, [], hidden)
            self._guess(guessing, hidden)

    def _guess(self, requests: list[Request], hidden: Tensor) -> None:
        """One more draft for each, with the noise of its place and under the request's own rules."""
        rows = [Row(r, list(r.drafts), len(r.tokens) + len(r.drafts), _allowed(r)) for r in requests]
        final, ids = self._model.choose(torch.nan_to_num(self._model.head(hidden)), rows)
        for n, (r, token) in enumerate(zip(requests, ids, strict=True)):
            r.drafts.append(token)
            if r.sampling.verify == "rejection":
                r.draft_logits = [*(r.draft_logits or []), final[n]]


def _rows(values: Tensor, picked: list[int]) -> Tensor:
    """These rows, each once and in their order: a view where they lie side by side."""
    first = picked[0]
    if picked[-1] - first == len(picked) - 1:
        return values[first : first + len(picked)]
    return values[torch.tensor(picked, device=values.device)]


def _allowed(r: Request) -> Tensor | None:
    """What the request's grammar allows after its drafts; None where it says nothing."""
    if r.grammar is None:
        return None
    try:
        masks = r.grammar.masks(r.drafts)
    except Dsv3Error:  # the next step says it
        return None
    return masks[-1] if len(masks) > len(r.drafts) else None


def _wanted(r: Request) -> int:
    """Drafts worth guessing: the step that verifies them gives one token more."""
    return min(r.k, r.limit - r.new - 1)


def _adapt(r: Request, right: int, guessed: int) -> None:
    """One draft more after a step that accepted all, one fewer after one that accepted none."""
    if not r.sampling.adaptive or not guessed:
        return
    if right >= guessed:
        r.k = min(r.k + 1, r.sampling.draft_tokens)
    elif right == 0:
        r.k = max(1, r.k - 1)
