"""Training of the transformer under DeepSpeed."""
