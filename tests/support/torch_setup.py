"""torch on two threads, and torchvision beside a CPU build of torch."""

import torch

torch.set_num_threads(2)


def register_torchvision_operators():
    """torchvision's compiled operators do not load beside a CPU build of torch; two are named at import."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


register_torchvision_operators()
