"""star-dist: distributed pretraining of STAR, the scale-wise autoregressive text-to-image transformer."""

__version__ = "0.1.0"
