"""The model over a text, layer by layer, with one linear's weights in memory at a time (an attention block's at most)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.checkpoint.calibrate.attention import attend
from dsv3.checkpoint.calibrate.experts import feed_forward
from dsv3.checkpoint.calibrate.source import Source
from dsv3.checkpoint.calibrate.visitor import Visitor
from dsv3.graph.config import ModelConfig
from dsv3.graph.yarn import cos_sin_table


@dataclass
class State:
    """Between layers: hidden states [S, W, H] float32 before layer `layer`."""

    hidden: Tensor
    layer: int


class Sweep:
    """windows: token ids [S, W], each a text of its own; see `check_windows`."""

    def __init__(self, config: ModelConfig, source: Source, windows: Tensor, visitor: Visitor) -> None:
        self.config, self.source, self.windows, self.visitor = config, source, windows, visitor
        self.cos_sin = cos_sin_table(config, "cpu", windows.shape[1] + 1)

    def start(self) -> State:
        """The embedded text."""
        table = self.source.real("model.embed_tokens.weight")
        return State(torch.nn.functional.embedding(self.windows.long(), table), 0)

    def advance(self, state: State) -> State:
        """Through layer `state.layer`; from the last layer of the model into the first MTP module, and on."""
        first = self.config.num_hidden_layers
        hidden = state.hidden if state.layer < first else self._combined(state.hidden, state.layer)
        hidden = self._block(hidden, state.layer, position=0 if state.layer < first else 1)
        if state.layer == first - 1:
            hidden = self._norm(hidden, "model.norm.weight")
        elif state.layer >= first:
            hidden = self._norm(hidden, f"model.layers.{state.layer}.shared_head.norm.weight")
        return State(hidden, state.layer + 1)

    @property
    def layers(self) -> int:
        """How many there are to go through, MTP modules included."""
        first = self.config.num_hidden_layers
        extra = range(first, first + self.config.num_nextn_predict_layers)
        return first + sum(self.source.has(f"model.layers.{i}.enorm.weight") for i in extra)

    def _combined(self, hidden: Tensor, layer: int) -> Tensor:
        """What an MTP module takes: the next token's embedding beside the hidden state. One position shorter."""
        prefix, table = f"model.layers.{layer}", self.source.real("model.embed_tokens.weight")
        following = self.windows[:, -(hidden.shape[1] - 1) :]
        embedding = torch.nn.functional.embedding(following.long(), table)
        both = ops.mtp_combine(
            embedding=embedding.flatten(0, 1),
            hidden=hidden[:, :-1].flatten(0, 1),
            enorm=self.source.real(f"{prefix}.enorm.weight"),
            hnorm=self.source.real(f"{prefix}.hnorm.weight"),
            eh_proj=self.source.real(f"{prefix}.eh_proj.weight"),
            eps=self.config.rms_norm_eps,
        )
        return both.view(*following.shape, -1)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        normed = ops.rms_norm(hidden.flatten(0, 1), self.source.real(name), self.config.rms_norm_eps)
        return normed.view(hidden.shape)

    def _block(self, hidden: Tensor, layer: int, position: int) -> Tensor:
        prefix = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{prefix}.input_layernorm.weight")
        hidden = hidden + attend(self.source, self.visitor, normed, prefix, self.cos_sin, position)
        normed = self._norm(hidden, f"{prefix}.post_attention_layernorm.weight")
        made = feed_forward(self.source, self.visitor, normed.flatten(0, 1), layer)
        return hidden + made.view(hidden.shape)
