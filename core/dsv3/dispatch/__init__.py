"""From plugins to bound kernels: discovery, guarded probes, the choice of a backend, selection with reasons, binding.

Selection happens once, at load, and every decision keeps every rejected candidate with its reason.
"""
