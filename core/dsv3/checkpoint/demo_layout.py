"""Names and sharding of DeepSeek's inference demo (`model{i}-mp{n}.safetensors`), to and from Hugging Face's names."""

from __future__ import annotations

import re

# Module name in a layer: Hugging Face's, the demo's, and the axis that model parallelism splits (None: replicated).
_MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
    "head": ("head", 0),
    "enorm": ("enorm", None),
    "hnorm": ("hnorm", None),
    "eh_proj": ("eh_proj", None),
}
_TO_HF = {demo: hf for hf, (demo, _) in _MODULES.items() if hf != "head"}
_SCOPES = {"self_attn": "attn", "mlp": "ffn"}
_LEAVES = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias", "weight": "weight"}
_FILE = re.compile(r"^model(\d+)-mp(\d+)\.safetensors$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def demo_file(name: str) -> tuple[int, int] | None:
    """(rank, model parallel size) from a demo file's name, None for other files."""
    m = _FILE.match(name)
    return (int(m[1]), int(m[2])) if m else None


def to_hf(name: str) -> str | None:
    """Hugging Face's name of a demo tensor; None if it is not one."""
    parts = name.split(".")
    leaf = {demo: hf for hf, demo in _LEAVES.items()}.get(parts[-1])
    if leaf is None or len(parts) < 2:
        return None
    inner = {demo: hf for hf, demo in _SCOPES.items()}
    in_head = "shared_head" in parts
    mapped = []
    for part in parts[:-1]:
        hf = inner.get(part) or _TO_HF.get(part, part)
        mapped.append("head" if in_head and part == "head" else hf)
    prefix = "" if mapped[0] == "lm_head" else "model."
    found = prefix + ".".join([*mapped, leaf])
    return found if to_demo(found) == name else None  # another spelling, such as Hugging Face's own


def to_demo(name: str) -> str:
    """The demo's name of a Hugging Face tensor."""
    *parts, leaf = name.removeprefix("model.").split(".")
    mapped = [_SCOPES.get(p) or (_MODULES[p][0] if p in _MODULES else p) for p in parts]
    return ".".join([*mapped, _LEAVES.get(leaf, leaf)])


def shard_axis(name: str) -> int | None:
    """The axis along which model parallelism splits a tensor (Hugging Face's name); None: every rank has it whole, or, for a
    routed expert, one rank does."""
    if expert_index(name) is not None:
        return None
    module = name.split(".")[-2]
    return _MODULES.get(module, (module, None))[1]


def expert_index(name: str) -> int | None:
    """The routed expert that a tensor belongs to, None if it belongs to none."""
    m = _EXPERT.search(name)
    return int(m[1]) if m else None
