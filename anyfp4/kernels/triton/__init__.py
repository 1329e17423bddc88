"""Triton kernels for NVIDIA and AMD GPUs, and their launchers; imported by ``backends/triton.py`` alone."""
