"""The held-out texts as the story checkpoint's card reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WINDOW = 256


def windows(data: Path, tokenizer: Any) -> list[list[int]]:
    """Windows of 257 tokens (256 inputs, 256 targets): files in name order, documents stripped and encoded as [0] +
    ids + [1], all joined, consecutive windows starting at multiples of 256."""
    stream: list[int] = []
    for path in sorted((data / "data" / "heldout").glob("*.txt")):
        for document in path.read_text(encoding="utf-8").split("<|endoftext|>"):
            if document.strip():
                stream += [0, *tokenizer.encode_plain(document.strip()), 1]
    return [stream[at : at + WINDOW + 1] for at in range(0, len(stream) - WINDOW, WINDOW)]


def figures(model: Any, chosen: list[list[int]], mtp: bool = True) -> dict[str, float]:
    """loss, mtp_loss in nats per token; acceptance: share of rows where MTP row i and main row i + 1 have the same argmax."""
    loss = mtp_loss = agree = rows = mtp_rows = 0.0
    for window in chosen:
        logits = model.logits(window[:-1])
        targets = torch.tensor(window[1:])
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        rows += len(targets)
        if mtp:
            drafts = model.mtp_logits(window[:-1])
            mtp_loss += float(torch.nn.functional.cross_entropy(drafts, targets[1:], reduction="sum"))
            agree += float((drafts.argmax(-1) == logits[1:].argmax(-1)).sum())
            mtp_rows += len(drafts)
    if not mtp:
        return {"loss": loss / rows}
    return {"loss": loss / rows, "mtp_loss": mtp_loss / mtp_rows, "acceptance": agree / mtp_rows}
