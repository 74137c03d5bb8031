"""What commands say about a generation."""

from __future__ import annotations

from collections.abc import Mapping


def statistics(stats: Mapping[str, float]) -> str:
    """One line."""
    text = (
        f"dsv3: {stats['prompt_tokens']:.0f} prompt tokens, time to first token {stats['ttft_s']:.3f} s; "
        f"{stats['new_tokens']:.0f} new tokens, {stats['decode_tok_s']:.1f} tokens/s"
    )
    if stats["drafted"]:
        share = stats["accepted"] / stats["drafted"]
        text += f"; {stats['accepted']:.0f} of {stats['drafted']:.0f} drafts accepted ({share:.0%}), "
        text += f"{stats['new_tokens'] / stats['steps']:.2f} tokens a step"
    return text
