"""Attention kernels, one file each, behind the facade `star_dist.model.attention`."""
