"""What the commands take. Kept apart from the commands, so that help needs none of their imports."""

from __future__ import annotations

import argparse
import math

from dsv3 import __version__
from dsv3.cli.arguments_bench import bench
from dsv3.cli.flags import Parser, formats, placement, setting
from dsv3.settings import SETTINGS

# command -> module in dsv3.cli, one line of help
COMMANDS = {
    "run": ("run", "generate text from a prompt"),
    "chat": ("chat", "converse with a model in the terminal"),
    "serve": ("serve", "answer over HTTP as OpenAI's API does, with a chat page"),
    "probe": ("probe", "list backends and devices, and what is wrong with those that cannot be used"),
    "explain": ("explain", "show which kernel runs an operator, and why not the others"),
    "conformance": ("conformance", "prove that a backend's kernels are right, or find out where they are not"),
    "plugin": ("plugin", "start a backend of your own, or check the installed ones"),
    "convert": ("convert", "write a checkpoint in another number format or layout"),
    "eval": ("eval", "measure the quality of a checkpoint, or what a quantisation costs, on texts"),
    "export": ("export", "write a model in another format: ONNX graphs with their weights"),
    "tune": ("tune", "measure a model's kernels on this machine, and use the fastest right ones from then on"),
    "bench": ("bench", "measure speed beside what the machine can do, and what dsv3 itself costs"),
    "doctor": ("doctor", "show versions, devices, plugins and settings"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="dsv3", description="Run the DeepSeek-V3 family of language models on any accelerator.")
    parser.add_argument("--version", action="version", version=f"dsv3 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    made = {name: commands.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    for command in made.values():
        command.add_argument("--debug", action="store_const", const=True, help=SETTINGS["debug"].help)
    _run(made["run"])
    _chat(made["chat"])
    _serve(made["serve"])
    made["probe"].add_argument("--json", action="store_true", help="machine-readable output")
    _explain(made["explain"])
    _conformance(made["conformance"])
    _plugin(made["plugin"])
    _convert(made["convert"])
    _eval(made["eval"])
    _export(made["export"])
    _tune(made["tune"])
    bench(made["bench"])
    made["doctor"].add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="text to continue; none: standard input")
    placement(parser)
    setting(parser, "threads", "max_new_tokens", "temperature", "top_p", "seed", "draft")
    setting(parser, "check")
    parser.add_argument("--no-graphs", action="store_true", help="run decode steps kernel by kernel instead of as a graph")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")
    parser.add_argument("--interactive", action="store_true", help="converse; /clear forgets, /exit ends")
    parser.add_argument("--input-file", metavar="FILE", help="one prompt per line, answered in batches")
    parser.add_argument("--json", action="store_true", help="a JSON object per prompt on standard output")


def _chat(parser: argparse.ArgumentParser) -> None:
    placement(parser)
    setting(parser, "threads", "max_new_tokens", "temperature", "top_p", "seed", "draft")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    _chat_format(parser)
    parser.add_argument("--no-graphs", action="store_true", help="run decode steps kernel by kernel instead of as a graph")


def _chat_format(parser: argparse.ArgumentParser) -> None:
    families = ["deepseek_v3", "deepseek_r1", "deepseek_v31", "deepseek_v32"]
    text = "how conversations are written (default: the folder's own template, else DeepSeek-V3's; name R1's and V3.1's)"
    parser.add_argument("--chat-format", choices=families, help=text)


def _serve(parser: argparse.ArgumentParser) -> None:
    placement(parser)
    setting(parser, "threads")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--name", help="of the model in the API (default: its folder's)")
    text = "API keys, one on each line; more, separated by commas, in DSV3_API_KEYS"
    parser.add_argument("--key-file", metavar="FILE", help=text)
    _chat_format(parser)
    parser.add_argument("--insecure", action="store_true", help="let other machines in without keys")
    text = "guessed by the MTP module where a request says nothing; same text, fewer steps (default: 0)"
    parser.add_argument("--draft-tokens", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--max-batch", type=int, default=32, metavar="N", help="requests generated together (default: 32)")
    text = "room in the cache (default: 4096 for each of them, or a quarter of the free memory)"
    parser.add_argument("--cache-tokens", type=int, metavar="N", help=text)
    parser.add_argument("--step-tokens", type=int, default=2048, metavar="N", help="of a step at most (default: 2048)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait (default: 256)")
    text = "after SIGTERM, for the requests at hand (default: 30)"
    parser.add_argument("--drain", type=float, default=30, metavar="S", help=text)


def _explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", metavar="OP", help="operator; none: all of them")
    placement(parser)
    parser.add_argument("--tokens", type=int, metavar="N", help="only for steps of N tokens")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _conformance(parser: argparse.ArgumentParser) -> None:
    text = "run (the default); export DIR: write the cases as ONNX test vectors; verify FILE: check a certificate"
    parser.add_argument("action", nargs="?", choices=["run", "export", "verify"], default="run", help=text)
    parser.add_argument("path", nargs="?", metavar="PATH", help="the folder of export, the certificate of verify")
    setting(parser, "backend")
    parser.add_argument(
        "--level", default="L1", metavar="L0..L3", help="L0 loads, L1 operators, L2 model, L3 serving (default: L1)"
    )
    parser.add_argument("--ops", metavar="A,B", help="only these operators, at level L1")
    parser.add_argument("--cases", metavar="GLOB", help="only cases whose id matches")
    parser.add_argument("--size", metavar="quick|small|full", help="how many cases (default: full; export: quick)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the data (default: 0)")
    parser.add_argument("--emulate", nargs="?", const=True, metavar="ARCH", help="the backend's kernels without its device")
    parser.add_argument("--waivers", metavar="FILE", help="lines of: case-id  reason  url")
    parser.add_argument("--report", metavar="DIR", help="write JUnit, JSONL, SUPPORT.md, an HTML page, a certificate there")
    parser.add_argument("--fail-fast", action="store_true", help="end at the first failure")
    parser.add_argument("--verbose", action="store_true", help="list every case")
    setting(parser, "threads")


def _plugin(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    new = actions.add_parser("new", help="write a complete distribution to start from", description="Write dsv3-NAME.")
    new.add_argument("name", metavar="NAME", help="of the backend; the package is dsv3-NAME")
    new.add_argument("--into", default=".", metavar="DIR", help="folder to write it in (default: here)")
    check = actions.add_parser("check", help="does it load and register rightly? (level L0)", description="Run level L0.")
    check.add_argument("name", nargs="?", metavar="NAME", help="backend; none: every one from outside dsv3")
    check.add_argument("--json", action="store_true", help="machine-readable output")
    for action in (new, check):
        action.add_argument("--debug", action="store_const", const=True, help=SETTINGS["debug"].help)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint folder; 'demo' is the bundled one")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist, or hold the same conversion unfinished")
    text = "number format (Hugging Face's layout), or layout: hf, or demo, DeepSeek's inference demo"
    parser.add_argument("--to", required=True, choices=["bf16", "fp8", "int8", "int4", "hf", "demo"], help=text)
    parser.add_argument("--model-parallel", type=int, metavar="N", help="ranks of the demo's layout (default: 1)")
    text = "of FP8 scales: any number, or powers of two (default: float32)"
    parser.add_argument("--scale-fmt", choices=["float32", "ue8m0"], help=text)
    parser.add_argument("--weight-only", action="store_true", help="INT8 weights for activations that stay as they are")
    text = "fit to a text: int8 moves outlier channels into the weights, int4 lets rounding errors cancel; slow"
    parser.add_argument("--calibrate", nargs="+", metavar="FILE", help=text)
    parser.add_argument("--calibrate-tokens", type=int, default=16384, metavar="N", help="of it (default: 16384)")
    parser.add_argument("--no-mtp", action="store_true", help="leave out the MTP modules")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one a core, at most 8)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")


def _eval(parser: argparse.ArgumentParser) -> None:
    text = "UTF-8 text files, and folders of *.txt; documents separated by <|endoftext|>"
    parser.add_argument("--text", nargs="+", action="extend", required=True, metavar="F", help=text)
    text = "compare with a checkpoint folder or 'demo', as stored; or with the same checkpoint under a scheme, such as none"
    parser.add_argument("--against", metavar="DIR_OR_QUANT", help=text)
    placement(parser)
    setting(parser, "threads")
    parser.add_argument("--window", type=int, default=256, metavar="N", help="tokens, each window cold (default: 256)")
    parser.add_argument("--tokens", type=int, metavar="N", help="predict at most the first N tokens (default: all)")
    parser.add_argument("--no-mtp", action="store_true", help="leave MTP modules out")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there, as SVG")
    parser.epilog = "--quant, --kv-dtype and --kernel are for the model alone, all other flags for both."


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder; 'demo' is the bundled one")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--format", choices=["onnx"], required=True, help="onnx: standard operators, prefill and decode")
    parser.add_argument("--dtype", help="of activations and weights: float64, float32 or bfloat16 (default: float32)")


def _tune(parser: argparse.ArgumentParser) -> None:
    formats(parser)
    parser.add_argument("--budget", type=_seconds, default=120.0, metavar="SECONDS", help="time to spend (default: 120)")
    parser.add_argument("--ops", metavar="A,B", help="only these operators")
    parser.add_argument("--list", action="store_true", help="show what was measured, and what of it no longer counts")
    parser.add_argument("--clear", action="store_true", help="forget what was measured for this backend and device")
    setting(parser, "tuning_dir")


def _seconds(text: str) -> float:
    """ "120" or "120s"."""
    seconds = float(text.removesuffix("s"))
    if not math.isfinite(seconds):
        raise ValueError("not finite")
    return seconds
