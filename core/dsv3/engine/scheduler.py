"""Which tokens of which requests a step computes. There is no prefill and no decode here: a request has tokens, some of them
are in the cache, and every step brings some more there, drafts included (the scheduler of vLLM's engine works so). No torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dsv3.engine.blocks import BlockPool, PrefixKeys
from dsv3.engine.request import Request, Status, TokenLogprobs


@dataclass
class Work:
    """A request's share of a step: `ids` from position `start` on, of which the last `drafts` are guessed and the first
    `unwritten` are in the cache already."""

    request: Request
    start: int
    ids: list[int]
    drafts: int
    unwritten: int

    @property
    def rows(self) -> int:
        """How many of its last rows a token is chosen after; 0 while there are more known tokens to come."""
        return self.drafts + 1 if self.start + len(self.ids) - self.drafts == len(self.request.tokens) else 0


class Scheduler:
    """budget: tokens of a step; beside: of them, those of prompts while others are waiting for their next token; most: requests
    at a time. Blocks are held by running requests only."""

    def __init__(self, pool: BlockPool, budget: int = 2048, beside: int = 256, most: int = 32) -> None:
        self.pool, self.budget, self.beside, self.most = pool, budget, beside, most
        self.keys = PrefixKeys(pool.size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._rows = list(range(most - 1, -1, -1))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> list[Work]:
        """The next step. Requests whose next token depends on one alone come first, and then prompts; who came first, first."""
        plan: list[Work] = []
        left, preempted = self.budget, False
        decodes = [r for r in self.running if len(r.tokens) - r.computed == 1]
        prompts = [r for r in self.running if len(r.tokens) - r.computed > 1]
        for request in (*decodes, *prompts):
            if prompts and request is prompts[0] and plan:
                left = min(left, self.beside)
            if request.status is not Status.RUNNING:  # preempted by one before it
                continue
            work = self._work(request, left)
            if work is None:
                continue
            before = len(self.running)
            if self._make_room(request, work):
                plan.append(work)
                left -= len(work.ids)
            preempted = preempted or len(self.running) < before
        plan = [w for w in plan if w.request.status is Status.RUNNING]
        if plan and not prompts:
            left = min(left, self.beside)
        at = 0
        for request in self.running if self.waiting else ():
            if request.drafting:
                self._name(request)  # the MTP module has filled its entries since the last step was taken
        while at < min(len(self.waiting), self.most) and not preempted and left > 0 and len(self.running) < self.most:
            request = self.waiting[at]
            if self._comes(request):
                at += 1
                continue
            if not self._admit(request):
                break
            del self.waiting[at]
            work = self._work(request, left)
            assert work is not None
            plan.append(work)
            left -= len(work.ids)
        return plan

    def _comes(self, r: Request) -> bool:
        """Whether what follows the known beginning of a prompt is just being computed for another: of several answers to one
        prompt, each would compute it."""
        usable = self._shareable(r)
        known = next((n for n, key in enumerate(r.keys[:usable]) if not self.pool.knows(key)), usable)
        return known < usable and any(
            o.keys[known : known + 1] == r.keys[known : known + 1] for o in self.running if len(o.tokens) - o.computed > 1
        )

    def _shareable(self, r: Request) -> int:
        """Blocks of a request's tokens that may be another's, all with their keys."""
        self.keys.extend(r.keys, r.tokens, self._salt(r))
        return 0 if r.rates_prompt else (len(r.tokens) - 1) // self.pool.size  # one token stays, to take logits from

    def _work(self, r: Request, left: int) -> Work | None:
        known = r.tokens[r.computed : r.computed + left]
        if not known:
            return None
        ends = r.computed + len(known) == len(r.tokens)
        drafts = r.drafts[: left - len(known)] if ends else []
        return Work(r, r.computed, known + drafts, len(drafts), max(0, min(r.written - r.computed, len(known))))

    def _make_room(self, request: Request, work: Work) -> bool:
        """Blocks for the work, taken from the youngest if need be; False where that is the request itself."""
        need = self.pool.blocks_for(work.start + len(work.ids) + request.spare) - len(request.blocks)
        while need > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks += self.pool.take(max(0, need))
        return True

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        request.status = Status.PREEMPTED
        request.preempted += 1
        request.computed = request.written = request.filled = 0
        request.drafts, request.draft_logits = [], None
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        """Out of the running; what it knows stays findable."""
        self._name(request)
        self.pool.release(request.blocks)
        request.blocks = []
        self.running.remove(request)
        self._rows.append(request.row)
        request.row = -1

    def _admit(self, request: Request) -> bool:
        """Only where all of it fits, so that two halves of prompts never wait for each other, and leaves a block for each that
        runs and will grow."""
        r, pool = request, self.pool
        held = pool.match(r.keys[: self._shareable(r)])
        need = pool.blocks_for(len(r.tokens) + r.spare) - len(held)
        growing = sum(pool.blocks_for(o.longest) - len(o.blocks) for o in self.running)
        if need + min(growing, len(self.running)) > pool.free:
            pool.release(held)
            return False
        r.blocks = held + pool.take(max(0, need))
        r.computed = r.written = r.filled = len(held) * pool.size
        if r.status is Status.WAITING:
            r.cached = r.computed
        if r.drafting and r.computed:
            r.computed -= 1  # its hidden state is what the next entry of the MTP module is made of
        r.status, r.row = Status.RUNNING, self._rows.pop()
        self.running.append(r)
        return True

    @staticmethod
    def _salt(request: Request) -> bytes:
        """Blocks with and without entries of the MTP module are not the same."""
        return request.salt + (b"\1" if request.drafting else b"\0")

    def _name(self, r: Request) -> None:
        whole = min(r.computed, len(r.tokens), r.filled if r.drafting else r.computed) // self.pool.size
        if whole:
            self.keys.extend(r.keys, r.tokens[: whole * self.pool.size], self._salt(r))
            self.pool.name(r.blocks[:whole], r.keys[:whole])

    def commit(self, work: Work, chosen: list[int], logprobs: list[TokenLogprobs | None]) -> str:
        """Take what came of a work: `chosen` tokens, all but the last of which are its drafts -> the text that may be shown.
        The request may have been aborted in the meantime."""
        r, shown = work.request, ""
        if r.status is not Status.RUNNING:
            return shown
        r.computed = work.start + len(work.ids) - work.drafts
        for n, (token, found) in enumerate(zip(chosen, logprobs, strict=True)):
            r.computed += n > 0
            shown += r.append(token, found)
            if r.done:
                break
        if r.done:
            self._leave(r)
        else:
            self._name(r)
        return shown

    def abort(self, request: Request, error: BaseException | None = None) -> None:
        """End a request at whatever point it is; it may have ended already."""
        if request.done:
            return
        if request.status is Status.RUNNING:
            self._leave(request)
        elif request in self.waiting:  # else it was never added
            self.waiting.remove(request)
        request.status, request.error = Status.ABORTED, error

    def check(self) -> None:
        """AssertionError unless the books balance."""
        self.pool.check(r.blocks for r in self.running)
        assert all(not r.blocks for r in self.waiting), "a waiting request holds blocks"
        assert sorted([r.row for r in self.running] + self._rows) == list(range(self.most)), "a row is lost"
        for r in self.running:
            assert r.computed < len(r.tokens) <= len(r.prompt) + max(r.limit, 0), "a request has nothing to compute"
            assert len(r.blocks) * self.pool.size >= r.computed, "computed tokens without memory"
