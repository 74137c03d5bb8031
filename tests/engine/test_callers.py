"""Who asks, and from where: several threads, coroutines, callers who leave, a model that is closed."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import dsv3
from dsv3.errors import Dsv3Error, UsageError

PROMPTS = ["Once upon a time", "The little fox", "There was once a king who", "Tom had a red ball"]


@pytest.fixture(scope="module")
def model(small: dsv3.Model) -> dsv3.Model:
    return small


@pytest.fixture(scope="module")
def wanted(model: dsv3.Model) -> list[list[int]]:
    return [model.generate(p, max_new_tokens=12).ids for p in PROMPTS]


def test_threads_are_answered_together(model: dsv3.Model, wanted: list[list[int]]) -> None:
    found: dict[int, list[int]] = {}
    before = model.engine.steps

    def ask(n: int) -> None:
        found[n] = model.generate(PROMPTS[n], max_new_tokens=12).ids

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == wanted
    assert model.engine.steps - before < 4 * 12, "they shared steps"
    model.engine.check()


def test_coroutines(model: dsv3.Model, wanted: list[list[int]]) -> None:
    async def both() -> None:
        many = await asyncio.gather(*[model.agenerate(p, max_new_tokens=12) for p in PROMPTS])
        assert [g.ids for g in many] == wanted
        together = await model.agenerate(PROMPTS, max_new_tokens=12)
        assert [g.ids for g in together] == wanted
        pieces = [piece async for piece in model.astream(PROMPTS[0], max_new_tokens=12)]
        assert "".join(pieces) == many[0].text and len(pieces) > 3
        with pytest.raises(UsageError, match="temperature"):
            await model.agenerate("x", temperature=-1)

    asyncio.run(both())
    assert model.generate(PROMPTS[1], max_new_tokens=12).ids == wanted[1], "calls and coroutines may be mixed"


def test_a_cancelled_coroutine_ends_its_generation(model: dsv3.Model) -> None:
    async def leave() -> None:
        task = asyncio.create_task(model.agenerate("Once", max_new_tokens=400, ignore_eos=True))
        while not model.engine.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    _idle(model)


def _idle(model: dsv3.Model) -> None:
    deadline = time.monotonic() + 10
    while not model.engine.idle or model.engine.pool.free != model.engine.pool.total:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    model.engine.check()


def test_a_stream_that_is_left_ends_its_generation() -> None:
    with dsv3.load("demo", dtype="float32") as model:
        stream = model.stream("Once upon a time", max_new_tokens=400, ignore_eos=True)
        next(stream)
        assert model.engine.running == 1
        del stream
        gc.collect()
        assert model.engine.running == 0 and model.engine.pool.free == model.engine.pool.total


def test_a_model_can_be_used_after_it_was_closed(small_folder: Path, wanted: list[list[int]]) -> None:
    model = dsv3.load(str(small_folder), dtype="float64")
    stream = model.stream(PROMPTS[0], max_new_tokens=200)
    next(stream)
    engine = model.engine
    model.close()
    with pytest.raises(Dsv3Error, match="closed"):
        list(stream)
    with pytest.raises(Dsv3Error, match="closed"):
        engine.submit(model.requests(["x"], {}))
    assert model.generate(PROMPTS[0], max_new_tokens=12).ids == wanted[0]


def test_a_program_with_a_running_engine_ends() -> None:
    code = (
        "import asyncio, dsv3\nmodel = dsv3.load('demo', dtype='float32')\n"
        "async def main():\n"
        "    stream = model.astream('Once', max_new_tokens=3000, ignore_eos=True)\n"
        "    print(await anext(stream))\n"
        "asyncio.run(main())\nmodel.engine.start()\n"
        "model.engine.submit(model.requests(['Once'], {'max_new_tokens': 3000, 'ignore_eos': True}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if not line.startswith("dsv3: compiling")]  # on a machine's first start
    assert done.returncode == 0 and not said, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_is_told_instead_of_waiting_without_end() -> None:
    code = (
        "import os, sys, dsv3\nmodel = dsv3.load('demo', dtype='float32', threads=int(sys.argv[1]))\n"
        "text = model.generate('Once', max_new_tokens=3).text\nchild = os.fork()\n"
        "if child:\n    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "try:\n    os._exit(3 if model.generate('Once', max_new_tokens=3).text == text else 4)\n"
        "except dsv3.UsageError as error:\n    os._exit(5 if 'spawn' in str(error) else 6)\n"
    )
    for threads, wanted in ((2, 5), (1, 3)):
        done = subprocess.run([sys.executable, "-c", code, str(threads)], capture_output=True, text=True, timeout=120)
        assert done.returncode == wanted, (threads, done.stderr)


def test_no_signal_handler_is_installed(model: dsv3.Model) -> None:
    import signal

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    model.generate("Once", max_new_tokens=2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
