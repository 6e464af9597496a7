"""Models: backbones, the diffusion U-Net and VAE, adapters, over shared layers and attention."""
