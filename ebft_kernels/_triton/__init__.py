"""Triton kernels, one file per family; ``ebft_kernels/dispatch.py`` imports them when one of them is first wanted."""
