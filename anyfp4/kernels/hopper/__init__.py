"""Kernels for Hopper (sm_90a): CUDA C++ beside their launchers, compiled when they are first used."""
