"""Level L0, "loads": what a backend must be before any of its kernels is tried. Nothing here needs a device."""
