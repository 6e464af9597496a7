"""Tests that use PyTorch and the original libraries."""

import torch_setup  # noqa: F401
