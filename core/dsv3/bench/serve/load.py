"""Many requests: when each is due, what it asks, and how many are under way together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv3.bench.serve.client import Question, Sample, ask, told
from dsv3.bench.serve.http import Failure, Target, request
from dsv3.errors import Dsv3Error, UsageError

FIRST_ID = 3  # of the ids that prompts are made of; those below begin, end and pad texts in DeepSeek's vocabularies
_MODEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, uniformly from low to high, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"


def lengths(text: str, name: str) -> Lengths:
    """ "128" or "100-200"; UsageError names the flag."""
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash)):
        raise UsageError(f"--{name} {text!r}: expected tokens, such as 128 or 100-200")
    found = Lengths(int(low), int(high) if dash else int(low))
    if not 1 <= found.low <= found.high:
        raise UsageError(f"--{name} {text!r}: expected at least 1 token, the smaller number first")
    return found


def plan(count: int, rate: float, inputs: Lengths, outputs: Lengths, vocabulary: int, seed: int) -> list[Question]:
    """Arrivals of a Poisson process of `rate` a second, all at once if it is infinite; prompts of random ids, no two alike."""
    chance = random.Random(seed)
    planned, made = 0.0, []
    for index in range(count):
        if index and math.isfinite(rate):
            planned += chance.expovariate(rate)
        size, asked = chance.randint(inputs.low, inputs.high), chance.randint(outputs.low, outputs.high)
        prompt = [chance.randrange(FIRST_ID, vocabulary) for _ in range(size)]
        made.append(Question(index, planned, prompt, asked))
    return made


async def model_of(where: Target, timeout: float = 10.0) -> str:
    """The name of the model that the server serves. Dsv3Error if there is no server, or it does not say."""
    try:
        async with asyncio.timeout(timeout), request(where, "GET", "/v1/models") as response:
            body = await response.read(_MODEL_BYTES)
    except TimeoutError as error:
        raise Dsv3Error(f"{where}: no answer within {timeout:g} s; is it a dsv3 server, and ready?") from error
    except Failure as failure:
        raise Dsv3Error(f"{where}: {failure}; start a server with `dsv3 serve`, or name another --url") from failure
    if response.status == 401:
        raise Dsv3Error(f"{where}: {told(body)}; name a file with the server's key by --key-file")
    try:
        if response.status == 200:
            return str(json.loads(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        pass
    raise Dsv3Error(f"{where}/v1/models names no model (status {response.status}: {told(body)}); is this a dsv3 server?")


async def run(
    where: Target, model: str, questions: Sequence[Question], concurrency: int | None = None, timeout: float = 600.0,
    done: Callable[[int], None] = lambda n: None,
) -> list[Sample]:  # fmt: skip
    """A sample for each question, in their order. concurrency: how many at once; one more that is due waits for another's
    end, and its times count from then. done: told how many have ended."""
    free: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
    if concurrency is not None:
        free = asyncio.Semaphore(concurrency)
    began, ended = time.perf_counter(), 0

    async def one(question: Question) -> Sample:
        nonlocal ended
        await asyncio.sleep(question.planned - (time.perf_counter() - began))
        async with free:
            sample = await ask(where, model, question, began, timeout)
        ended += 1
        done(ended)
        return sample

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(question)) for question in questions]
    return [task.result() for task in tasks]
