"""Triton kernels, one file per family; ``ebft_kernels/dispatch.py`` imports them where triton is installed and a GPU is there."""
