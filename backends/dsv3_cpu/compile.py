"""numba's decorators as kernels use them, and machine code of a function: one C function that needs nothing of numba.

numba's own C functions answer to Python for what may go wrong, and allocate with its library. Ours return numba's status, 0
unless memory ran out, and allocate with the system's, so that a later start can link them without importing numba.
"""

from __future__ import annotations

import types as python
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock

from dsv3_cpu.parts import Part

# Sums may be reordered and products contracted; NaN, infinity and -0 keep their meaning.
_SUMS = frozenset({"reassoc", "contract", "arcp"})
# Of functions that only kernels call: what Python would need to call them takes longer to compile than they do.
_INNER: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "boundscheck": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
    "pipeline_class": Part,
}  # fmt: skip
_WORD, _BYTES = ir.IntType(64), ir.IntType(8).as_pointer()
# numba's record of an allocation: references, how to end it, its argument, the data, their size, who allocated.
_HEADER = 64
_DATA = 24  # bytes from the record to the address of the data


def inner(function: Callable[..., Any]) -> Any:
    """A function that kernels call, with sums in any order."""
    return numba.njit(fastmath=set(_SUMS), **_INNER)(function)


def strict(function: Callable[..., Any]) -> Any:
    """A function that kernels call, whose order of operations is kept."""
    return numba.njit(fastmath={"contract"}, **_INNER)(function)


def without_nan(function: Callable[..., Any]) -> Any:
    """A function that kernels call, with sums in any order, over numbers that are no NaN and zeros whose sign is nobody's."""
    return numba.njit(fastmath={*_SUMS, "nnan", "nsz"}, **_INNER)(function)


def overloads(stub: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """numba's `overload`, with sums in any order: the decorated function gets types, and returns what is compiled for them."""
    from numba.extending import overload

    options = {**_INNER, "fastmath": set(_SUMS)}
    decorate: Any = overload
    return decorate(stub, jit_options=options, inline="never")


def _entry(block: int, team: int, me: int, crew: int) -> None:
    """What a program is: the kernel with its arguments read from their block. Its globals are set for each program."""
    _kernel(team, me, crew, *_unpack(block))  # type: ignore[name-defined]  # noqa: F821


def program(kernel: Callable[..., Any], signature: str, name: str) -> bytes:
    """The object of a kernel for arguments of a signature (see `programs.Kernel`): name(block, team, me, crew) -> status."""
    from dsv3_cpu.kernels.arguments import unpacker

    scope = {"_kernel": inner(kernel), "_unpack": unpacker(signature)}
    return exported(python.FunctionType(_entry.__code__, scope, "entry"), 4, name, status=True)


def exported(function: Callable[..., Any], words: int, name: str, status: bool = False) -> bytes:
    """The object of a function of so many int64 as name(..) -> what it returns, or with `status` whether it failed."""
    with global_compiler_lock:
        return _exported(function, words, name, status)


def _exported(function: Callable[..., Any], words: int, name: str, status: bool) -> bytes:
    dispatcher = strict(function)
    dispatcher.compile((types.intp,) * words)
    (made,) = dispatcher.overloads.values()
    codegen, context = made.library.codegen, made.target_context
    library = JITCodeLibrary(codegen, name)
    module = library.create_ir_module(name)
    callee = ir.Function(
        module,
        context.call_conv.get_function_type(made.signature.return_type, made.signature.args),
        made.fndesc.llvm_func_name,
    )
    outer = ir.Function(module, ir.FunctionType(_WORD, [_WORD] * words), name)
    builder = ir.IRBuilder(outer.append_basic_block())
    state, value = context.call_conv.call_function(builder, callee, made.signature.return_type, made.signature.args, outer.args)
    builder.ret(builder.sext(state.code, _WORD) if status else value)
    _memory(module)
    library.add_ir_module(module)
    library.add_linking_library(made.library)
    return _object(library, name)


def _memory(module: Any) -> None:
    """numba's allocation by the system's: what `np.empty` in a kernel, and the end of its array, call."""
    malloc = ir.Function(module, ir.FunctionType(_BYTES, [_WORD]), "dsv3_malloc")
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [_BYTES]), "dsv3_free")
    allocate = ir.Function(module, ir.FunctionType(_BYTES, [_WORD, ir.IntType(32)]), "NRT_MemInfo_alloc_aligned")
    size, align = allocate.args
    b = ir.IRBuilder(allocate.append_basic_block())
    wide = b.zext(align, _WORD)
    record = b.call(malloc, [b.add(size, b.add(wide, ir.Constant(_WORD, _HEADER)))])
    at = b.ptrtoint(record, _WORD)
    with b.if_then(b.icmp_unsigned("!=", at, ir.Constant(_WORD, 0))):
        end = b.add(at, b.add(wide, ir.Constant(_WORD, _HEADER - 1)))
        data = b.and_(end, b.neg(wide))
        for offset, value in ((0, ir.Constant(_WORD, 1)), (_DATA, data), (_DATA + 8, size)):
            b.store(value, b.inttoptr(b.add(at, ir.Constant(_WORD, offset)), _WORD.as_pointer()))
    b.ret(record)
    end_of = ir.Function(module, ir.FunctionType(ir.VoidType(), [_BYTES]), "NRT_MemInfo_call_dtor")
    b = ir.IRBuilder(end_of.append_basic_block())
    b.call(free, end_of.args)
    b.ret_void()


def _object(library: Any, name: str) -> bytes:
    """Everything in one module, of which only `name` is seen from outside, optimised as numba does, as machine code."""
    module = library._final_module
    for linked in library._linking_libraries:
        module.link_in(linked._get_module_for_linking(), preserve=True)
    for part in (*module.functions, *module.global_variables):
        if not part.is_declaration and part.name != name and part.linkage.name != "appending":
            part.linkage = "internal"
    library._optimize_final_module()
    module.verify()
    code: bytes = library.codegen._tm.emit_object(module)
    return code
