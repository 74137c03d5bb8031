"""Compiling the kernels for devices that are not here, and reading what came out."""
