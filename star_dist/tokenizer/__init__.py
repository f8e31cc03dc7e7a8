"""The multi-scale VQ-VAE: pictures to token maps and back, and its training."""
