"""Weights: two-way name tables, readers of every published layout, writers, and the filling of a program."""

from diva_jax.weights.parts import load

__all__ = ["load"]
