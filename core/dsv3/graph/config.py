"""The model's configuration, in Hugging Face's field names. Reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers (Peng et al. 2023). `original_max_position_embeddings` is the length before extension."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """One model of the DeepSeek-V3 family. `rope_scaling` None: plain RoPE. `q_lora_rank` None: queries are not compressed.
    `quant_method` is how linears are stored: "none", "fp8", "int8", "int8-packed" or "int4" (see `checkpoint.stored`);
    `scale_fmt` is that of the FP8 activations that meet them, `quant_activations` whether INT8 weights are meant for INT8
    activations.
    `mtp_hidden`: whether an MTP module takes the main model's hidden state after ("post_norm") or before the final norm."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    first_k_dense_replace: int
    moe_layer_freq: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int | None
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Yarn | None
    num_nextn_predict_layers: int
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    torch_dtype: str
    quant_method: str = "none"
    scale_fmt: str = "float32"
    quant_activations: bool = True
    mtp_hidden: str = "post_norm"

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts; MTP modules (layer >= num_hidden_layers) have them whenever the model has any."""
        if self.n_routed_experts is None:
            return False
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_router_bias(self) -> bool:
        """noaux_tc routers carry e_score_correction_bias."""
        return self.topk_method == "noaux_tc"

    @property
    def group_score(self) -> str:
        """What ranks expert groups: noaux_tc sums the two best experts, group_limited_greedy takes the best."""
        return "top2_sum" if self.topk_method == "noaux_tc" else "max"
