"""MTP logits against transformers' MtpModel layer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.modeling_layers import MtpModel

import dsv3
from tests.support import hf


def _mtp_names(state: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The MTP layer's parameters under the names of the releases."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("layers.0."):
            continue
        inner = name.removeprefix("layers.0.").removeprefix("mtp_block.")
        inner = inner.replace("post_norm.weight", "shared_head.norm.weight") if inner.startswith("post_norm") else inner
        prefix = f"model.layers.{layer}."
        if inner.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                made[f"{prefix}mlp.experts.{e}.gate_proj.weight"] = gate.contiguous()
                made[f"{prefix}mlp.experts.{e}.up_proj.weight"] = up.contiguous()
        elif inner.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                made[f"{prefix}mlp.experts.{e}.down_proj.weight"] = down.contiguous()
        else:
            made[prefix + inner] = tensor
    return made


def test_mtp_logits_equal_transformers(tmp_path: Path) -> None:
    # transformers numbers MTP layers from 0, which first_k_dense_replace > 0 would make dense; the releases' are MoE.
    model = hf.random_model("v3", {**hf.V3, "first_k_dense_replace": 0, "num_mtp_layers": 1})
    torch.manual_seed(5)
    mtp = MtpModel(model, 1).eval()
    with torch.no_grad():
        for name, parameter in mtp.layers.named_parameters():
            scale, centre = (0.2, 1.0) if "norm" in name else (0.1, 0.0)
            parameter.copy_(centre + scale * torch.randn_like(parameter))
        for name, buffer in mtp.layers.named_buffers():
            if "e_score" in name:
                buffer.copy_(0.5 * torch.randn_like(buffer) - 3)
    hf.save(model, tmp_path)
    extra = _mtp_names(dict(mtp.state_dict()), 3)
    assert any("e_score" in name for name in extra)
    hf.rewrite(tmp_path, lambda tensors: {**tensors, **extra}, num_nextn_predict_layers=1)

    ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = model.model(ids[None]).last_hidden_state[:, :-1]
        positions = torch.arange(1, len(ids))[None]
        out = mtp.forward_layer(0, hidden, positions, None, input_ids=ids[None, 1:])
        wanted = mtp._project_to_logits(out)[0]
    found = dsv3.load(str(tmp_path), dtype="float32")
    error = {path: hf.relative(found.mtp_logits(ids, absorbed=path), wanted) for path in (False, True)}
    print(f"mtp: naive {error[False]:.1e}, absorbed {error[True]:.1e}")
    assert max(error.values()) <= 2e-4
