"""What the vendor's operators take, where a kernel's needs cannot say it. Imports no torch."""

from __future__ import annotations

from dsv3.plugin import Call

_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


def latent_attention(call: Call) -> str | None:
    """mla_decode: the head counts that the fused attention has."""
    heads = call.dims["Nh"]
    return None if heads in _HEADS else f"needs a power of two of heads up to 128; there are {heads}"


def transposing_bmm(call: Call) -> str | None:
    """bmm: all heads of a row have to be less than 65536 numbers."""
    width = call.dims["Nh"] * call.dims["A"]
    return None if width < 65536 else f"needs Nh * A below 65536; it is {width}"
