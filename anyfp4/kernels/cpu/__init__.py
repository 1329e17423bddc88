"""Compiled CPU kernels: building the package turns the C++ sources in ``src`` into the extension ``_native``."""
