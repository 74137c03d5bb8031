"""Triton kernels shared by the backends for NVIDIA and AMD. No triton is imported before a kernel is bound.

One module per kernel: the kernel, and the function that the dispatcher binds. `launch` runs a kernel where its tensors are: on
a GPU compiled, on the CPU in Triton's interpreter, on meta tensors not at all, but for who records what would be compiled.
Block sizes, warps and stages per architecture are tables in configs/kernels.
"""
