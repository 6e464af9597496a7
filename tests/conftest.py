"""Shared by all tests: eight fake CPU devices, torchvision beside a CPU build of torch."""

import chex
import jax
import pytest
import torch

chex.set_n_cpu_devices(8)
torch.set_num_threads(2)


def register_torchvision_operators():
    """torchvision's compiled operators do not load beside a CPU build of torch; two are named at import."""
    for name, schema in (
        ("nms", "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        (
            "qnms",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ),
    ):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{schema.split('(')[0]}", "(" + schema.split("(", 1)[1])


register_torchvision_operators()


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
