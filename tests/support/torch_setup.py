"""Limits torch to two threads, and makes torchvision importable with a CPU build of torch."""

import torch

torch.set_num_threads(2)

# Two operators that torchvision needs at import and does not load with a CPU build of torch.
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
