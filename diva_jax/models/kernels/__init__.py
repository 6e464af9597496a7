"""Pallas kernels for TPUs. Those that import Pallas are imported where they are traced: it takes 50 ms."""
