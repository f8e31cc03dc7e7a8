"""Captioned token maps: their format in MDS shards, and streaming them into training."""
