"""What `dsv3 bench` takes."""

from __future__ import annotations

import argparse
from typing import Any

from dsv3.cli.flags import Parser, placement, setting
from dsv3.settings import SETTINGS

PEERS = ("transformers", "llama.cpp", "vllm")


def bench(parser: argparse.ArgumentParser) -> None:
    """Add the subjects."""
    what = parser.add_subparsers(dest="bench", required=True, metavar="WHAT", parser_class=Parser)
    decode = _workload(what, "decode", "tokens per second of decoding, against the roofline of its steps", 1, "256", 32)
    decode.add_argument("--profile", action="store_true", help="how a step's time divides over operators, and outside kernels")
    _workload(what, "prefill", "tokens per second of reading a prompt, against the machine's matrix products", 1, "512,2048")
    _workload(what, "load", "from the files to the first token: seconds, GB/s, memory")
    ops = _workload(
        what, "ops", "every kernel of a decode step, or of a prompt: time, bytes, share of the ceiling", 1, "256", 8
    )
    ops.add_argument("--phase", choices=["decode", "prefill"], default="decode", help="(default: decode)")
    _peers(what)
    _serve(what)
    _dispatch(what)
    _aot(what)
    for made in what.choices.values():
        made.add_argument("--debug", action="store_const", const=True, help=SETTINGS["debug"].help)


def _workload(
    what: Any, name: str, text: str, batch: int | None = None, context: str | None = None, tokens: int | None = None
) -> argparse.ArgumentParser:
    """A subject that measures a model; None: it does not have that number."""
    made: argparse.ArgumentParser = what.add_parser(name, help=text, description=text)
    placement(made)
    setting(made, "threads")
    if batch is not None:
        made.add_argument("--batch", type=int, default=batch, metavar="N", help=f"sequences together (default: {batch})")
    if context is not None and "," in context:
        text = f"tokens of the prompt (default: {context})"
        made.add_argument("--context", default=context, metavar="N,N", help=text)
    elif context is not None:
        text = f"tokens of each sequence before (default: {context})"
        made.add_argument("--context", type=int, default=int(context), metavar="N", help=text)
    if tokens is not None:
        made.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"steps of a repeat (default: {tokens})")
    made.add_argument("--repeat", type=int, default=5, metavar="N", help="how often; medians are shown (default: 5)")
    made.add_argument("--json", metavar="FILE", help="write all figures there")
    made.add_argument("--compare", metavar="OLD.json", help="ratios to an earlier run of the same")
    made.add_argument("--plot", metavar="FILE", help="draw the roofline there, as .svg (.png with cairosvg)")
    return made


def _peers(what: Any) -> None:
    text = "the same tokens through dsv3 and other engines, each in a process of its own"
    made = what.add_parser("peers", help=text, description=text)
    placement(made)
    setting(made, "threads")
    listed = ", ".join(PEERS)
    made.add_argument("--only", metavar="A,B", help=f"which engines beside dsv3 (default: {listed})")
    text = "run an engine with a Python of its own; repeatable"
    made.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=text)
    text = "number format that llama.cpp gets: BF16, Q8_0 or Q4_0; several separated by commas (default: BF16)"
    made.add_argument("--gguf", default="BF16", metavar="TYPE,TYPE", help=text)
    text = "workloads of prefill-N, decode-bB-N (default: prefill-512,prefill-2048,decode-b1-32,decode-b1-2048,decode-b8-32)"
    made.add_argument("--workloads", metavar="A,B", help=text)
    made.add_argument("--tokens", type=int, default=32, metavar="N", help="decoded in a repeat (default: 32)")
    made.add_argument("--repeat", type=int, default=5, metavar="N", help="how often; medians are shown (default: 5)")
    made.add_argument("--timeout", type=int, default=1800, metavar="S", help="of one engine (default: 1800)")
    made.add_argument("--work", metavar="DIR", help="keep the GGUF files there (default: a folder that is removed)")
    made.add_argument("--json", metavar="FILE", help="write all figures there")


def _serve(what: Any) -> None:
    text = "a running server under load: waiting times, throughput, and requests that kept their goal"
    made = what.add_parser("serve", help=text, description=text)
    add = made.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server (default: http://127.0.0.1:8000)")
    add("--key-file", metavar="FILE", help="whose first line is the server's API key")
    text = "requests a second, arriving at random (Poisson); inf: all at once (default: inf)"
    add("--rate", type=float, default=float("inf"), metavar="R", help=text)
    add("--concurrency", type=int, metavar="N", help="under way together at most (default: any number)")
    add("--requests", type=int, default=100, metavar="N", help="how many (default: 100)")
    add("--input-tokens", default="128", metavar="N|A-B", help="of a prompt; A-B: uniformly between (default: 128)")
    add("--output-tokens", default="64", metavar="N|A-B", help="of an answer, its end ignored (default: 64)")
    text = "prompts are of random ids below N (default: 1000)"
    add("--vocabulary", type=int, default=1000, metavar="N", help=text)
    add("--seed", type=int, metavar="N", help="of arrivals, lengths and prompts (default: random)")
    add("--slo-ttft", type=float, metavar="MS", help="goal of a request: its first token within MS")
    add("--slo-itl", type=float, metavar="MS", help="goal of a request: on average a token every MS after the first")
    add("--timeout", type=float, default=600.0, metavar="S", help="of a request (default: 600)")
    add("--json", metavar="FILE", help="write all figures and every request there")
    add("--plot", metavar="FILE", help="draw waiting times and throughput there, as .svg (.png with cairosvg)")


def _dispatch(what: Any) -> None:
    text = "what a bound call costs beyond the direct call of its kernel, and that no step selects anything"
    made = what.add_parser("dispatch", help=text, description=text)
    placement(made)
    made.add_argument("--json", metavar="FILE", help="write the figures there too")


def _aot(what: Any) -> None:
    text = "every kernel compiled for devices that are not here: registers, spills, matrix instructions, loads"
    made = what.add_parser("aot", help=text, description=text)
    made.add_argument("--backend", metavar="NAME", help="whose kernels (default: cuda and rocm)")
    made.add_argument("--arch", metavar="A,B", help="architectures (default: all)")
    made.add_argument("--ops", metavar="A,B", help="operators (default: all)")
    made.add_argument("--full", action="store_true", help="every configuration, and float32 as well (an hour)")
    made.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    made.add_argument("--verbose", action="store_true", help="a line per call and configuration")
    made.add_argument("--json", metavar="FILE", help="write the rows there too")
