"""Bit models of tensor cores: what a matrix instruction computes, to the last bit, on any device."""

from anyfp4.numerics import blackwell, hopper

__all__ = ["blackwell", "hopper"]
