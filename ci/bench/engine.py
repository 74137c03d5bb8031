"""The engine's figures on one machine: what drafts bring, what a batch brings, and how long a long prompt keeps others waiting.

    python ci/bench/engine.py [--texts DIR] [--model DIR] [--threads N] [--repeat N] [--json FILE]

texts: a folder of *.txt, of which the first words of each are a prompt; the demo's own first sentences without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import dsv3

PROMPTS = ["Once upon a time", "The little fox", "There was once a king who", "One day a girl named Lily", "Tom had a red ball"]


def prompts(folder: str | None, words: int = 24, most: int = 16) -> list[str]:
    """The first words of documents."""
    if folder is None:
        return PROMPTS
    found = []
    for path in sorted(Path(folder).rglob("*.txt")):
        for document in path.read_text(encoding="utf-8").split("<|endoftext|>"):
            if len(document.split()) >= 2 * words:
                found.append(" ".join(document.split()[:words]))
    step = max(1, len(found) // most)
    return found[::step][:most]


def drafts(model: dsv3.Model, texts: list[str], tokens: int, repeat: int) -> list[dict[str, Any]]:
    """Greedy decoding one prompt at a time, with 0 to 4 drafts. Each prompt is continued with every number of drafts before the
    next is, as a machine's speed changes within seconds; medians over repeats of all prompts' tokens a second, and of the
    ratios to plain decoding in the same repeat."""
    counts = range(5)
    options: list[dict[str, Any]] = [{"draft": "mtp", "draft_tokens": k} if k else {} for k in counts]
    for extra in options:
        model.generate(texts[0], max_new_tokens=8, **extra)
    speeds: list[list[float]] = [[] for _ in counts]
    found: list[list[Any]] = []
    for _ in range(repeat):
        found = [[] for _ in counts]
        for text in texts:
            for k in counts:
                found[k].append(model.generate(text, max_new_tokens=tokens, ignore_eos=True, **options[k]))
        for k in counts:
            speeds[k].append(sum(g.stats["new_tokens"] - 1 for g in found[k]) / sum(_seconds(g) for g in found[k]))
    rows = []
    for k in counts:
        total = {name: sum(g.stats[name] for g in found[k]) for name in ("steps", "drafted", "accepted")}
        rows.append(
            {
                "drafts": k, "tokens_s": statistics.median(speeds[k]),
                "speed_up": statistics.median(own / plain for own, plain in zip(speeds[k], speeds[0], strict=True)),
                "same_tokens": [g.ids for g in found[k]] == [g.ids for g in found[0]],
                "accepted_share": total["accepted"] / total["drafted"] if k else 0.0,
                "accepted_per_step": total["accepted"] / total["steps"],
            }
        )  # fmt: skip
    return rows


def _seconds(g: Any) -> float:
    return float((g.stats["new_tokens"] - 1) / g.stats["decode_tok_s"])


def batches(model: dsv3.Model, texts: list[str], tokens: int, repeat: int) -> list[dict[str, Any]]:
    """New tokens a second of 32 requests, so many at a time, in turns."""
    many = (texts * 32)[:32]
    sizes = (1, 8, 32)
    speeds: list[list[float]] = [[] for _ in sizes]
    for _ in range(repeat):
        for own, at_once in zip(speeds, sizes, strict=True):
            model.serve_with(most=at_once, cache_tokens=64 * 32 * 8)
            start = time.perf_counter()
            found = model.generate(many, max_new_tokens=tokens, ignore_eos=True)
            own.append(sum(g.stats["new_tokens"] for g in found) / (time.perf_counter() - start))
    model.close()
    return [
        {
            "at_once": at_once, "tokens_s": statistics.median(own),
            "speed_up": statistics.median(some / one for some, one in zip(own, speeds[0], strict=True)),
        }
        for own, at_once in zip(speeds, sizes, strict=True)
    ]  # fmt: skip


def stall(model: dsv3.Model, length: int, beside: int) -> dict[str, float]:
    """Seconds between the tokens of one request, before a prompt of `length` tokens comes in and while it is read, against
    what a step with `beside` tokens of it takes by itself."""
    engine = model.serve_with(cache_tokens=64 * 128, beside=beside)
    ids = model.prompt_ids("Once upon a time")
    (short,) = model.requests([ids], {"max_new_tokens": 400, "ignore_eos": True})
    (long,) = model.requests([ids * (length // len(ids))], {"max_new_tokens": 1})
    engine.submit([short])
    quiet, busy, alone = [], [], []

    def step() -> float:
        start, before = time.perf_counter(), short.new
        engine.step()
        assert short.new == before + 1, "the short request waited"
        return time.perf_counter() - start

    for _ in range(40):
        quiet.append(step())
    engine.submit([long])
    while not long.done:
        busy.append(step())
    engine.abort([short])
    (again,) = model.requests([[5, *ids] * (length // len(ids))], {"max_new_tokens": 1})
    engine.scheduler.budget = beside
    engine.submit([again])
    while not again.done:
        start = time.perf_counter()
        engine.step()
        alone.append(time.perf_counter() - start)
    model.close()
    return {
        "quiet_s": statistics.median(quiet[5:]), "while_reading_s": statistics.median(busy), "longest_s": max(busy),
        "a_budget_alone_s": statistics.median(alone), "steps": float(len(busy)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json")
    a = parser.parse_args()
    model = dsv3.load(a.model, threads=a.threads)
    print(model.placement().summary)
    texts = prompts(a.texts)
    found: dict[str, Any] = {"placement": model.placement().summary, "prompts": len(texts)}
    found["drafts"] = drafts(model, texts, a.tokens, a.repeat)
    for row in found["drafts"]:
        share = f"{row['accepted_share']:.0%} of drafts accepted, {row['accepted_per_step']:.2f} a step"
        speed = f"{row['tokens_s']:7.1f} tokens/s, x {row['speed_up']:.2f}"
        print(f"{row['drafts']} drafts: {speed}; {share}; the same tokens: {row['same_tokens']}")
    found["batches"] = batches(model, texts, a.tokens, a.repeat)
    for row in found["batches"]:
        print(f"{row['at_once']:2} at once: {row['tokens_s']:7.1f} tokens/s, x {row['speed_up']:.2f}")
    found["stall"] = stall(model, 3000, 256)
    print("between tokens: " + ", ".join(f"{k} {v:.4f}" for k, v in found["stall"].items()))
    if a.json:
        Path(a.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
