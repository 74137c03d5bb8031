"""One launch, compiled for an architecture through Triton's own argument binding: the binary that a device would run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature


def target_of(arch: str) -> GPUTarget:
    """ "sm_90" -> CUDA's target, "gfx942" -> HIP's."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def build(kernel: Any, args: tuple[Any, ...], constants: Mapping[str, Any], arch: str) -> Any:
    """Triton's compiled kernel; `.asm` has its stages. args may be meta tensors, whose pointers count as aligned."""
    target = target_of(arch)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"enable_fp_fusion": True, **constants}
    bound, specialization, parsed = binder(*args, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, parsed)
    return compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=parsed.__dict__)
