"""Checkpoints: the two layouts of NVFP4 models, read and written."""
