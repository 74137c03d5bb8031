"""What a conversion shall make, and whether that makes sense for a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dsv3.checkpoint.stored import INTEGER, StoredFormat
from dsv3.errors import UsageError, nearest
from dsv3.graph.config import ModelConfig
from dsv3.graph.quantization import Quantization

To = Literal["bf16", "fp8", "int8", "int4", "hf", "demo"]


@dataclass(frozen=True)
class Target:
    """to: a number format, in Hugging Face's layout, or a layout, in the number format there is. model_parallel: ranks of the
    demo's layout. scale_fmt: of FP8 scales. weight_only: INT8 weights for activations that stay as they are. mtp: keep the
    MTP modules. calibrate: on a text: INT8 migrates outlier channels into the weights, INT4 compensates rounding errors."""

    to: To
    model_parallel: int | None = None
    scale_fmt: Literal["float32", "ue8m0"] | None = None
    weight_only: bool = False
    mtp: bool = True
    calibrate: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("to", self.to, get_args(To)),
            ("scale_fmt", self.scale_fmt or "float32", ("float32", "ue8m0")),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r} is not one of {', '.join(known)}{nearest(str(value), known)}")
        if self.model_parallel is not None and (self.to != "demo" or self.model_parallel < 1):
            raise UsageError(f"--model-parallel {self.model_parallel}: a number of ranks from 1 on, with --to demo only")
        if self.scale_fmt is not None and self.to != "fp8":
            raise UsageError(f"--scale-fmt {self.scale_fmt} goes with --to fp8 only")
        if self.weight_only and self.to != "int8":
            raise UsageError("--weight-only goes with --to int8 only; INT4 weights never meet quantised activations")

        if self.calibrate and (self.to not in ("int8", "int4") or self.weight_only):
            raise UsageError("--calibrate goes with --to int8 (activations and weights) and --to int4")

    @property
    def by_layer(self) -> bool:
        """Whether layers are written one after the other, a file for each."""
        return self.calibrate and self.to == "int4"

    @property
    def ranks(self) -> int:
        """Files of the demo's layout."""
        return self.model_parallel or 1

    def stored(self, c: ModelConfig) -> StoredFormat:
        """The format of the linears that are written."""
        if self.to == "int8":
            return "int8-packed" if self.weight_only else "int8"
        formats: dict[str, StoredFormat] = {"bf16": "none", "fp8": "fp8", "int4": "int4"}
        return formats.get(self.to, c.quant_method)  # type: ignore[arg-type]

    def quantization(self, c: ModelConfig) -> Quantization:
        """What config.json will say."""
        if self.to in ("hf", "demo"):
            return Quantization(c.quant_method, c.scale_fmt, c.quant_activations)
        activations = self.to != "int4" and not self.weight_only
        return Quantization(self.stored(c), self.scale_fmt or "float32", activations)

    def check(self, c: ModelConfig, is_demo_layout: bool, wide: bool = False) -> None:
        """UsageError where there is nothing to convert, or the layout cannot hold the format. wide: linears are in float32,
        whatever config.json says."""
        after = self.quantization(c)
        before = Quantization(c.quant_method, c.scale_fmt, c.quant_activations)
        same = (after.method, after.scale_fmt, after.activations) == (before.method, before.scale_fmt, before.activations)
        if self.to == "hf" and not is_demo_layout:
            raise UsageError("the checkpoint is in Hugging Face's layout already; --to hf converts from the demo's")
        if self.to in ("fp8", "int8", "int4") and same:
            raise UsageError(f"the checkpoint is stored in {self.to} already; --to hf or demo changes its layout")
        if self.to == "bf16" and c.quant_method == "none" and c.torch_dtype == "bfloat16" and not wide:
            raise UsageError("the checkpoint is in bf16 already; --to hf or demo changes its layout")
        if self.to == "demo" and c.quant_method in INTEGER:
            raise UsageError(f"the demo's layout has no {c.quant_method} weights: it knows bf16 and FP8")
