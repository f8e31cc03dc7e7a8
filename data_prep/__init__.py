"""Data preparation: sources of captioned pictures and the tokenization job that turns them into MDS shards."""
