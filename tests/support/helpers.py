"""What parity tests share."""

import numpy as np
import torch


def relative_error(ours, reference) -> float:
    """Relative L2 error, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter, norms and biases too, a random value, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                fan_in = p[0].numel()
                p.copy_(noise / fan_in**0.5)
            else:
                p.copy_(0.3 * noise + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return module.eval()


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """A torch module's state dict as numpy."""
    return {k: v.detach().cpu().numpy() for k, v in module.state_dict().items()}
