"""Export: a run or any source of weights as an open_clip, transformers or plain PyTorch model."""
