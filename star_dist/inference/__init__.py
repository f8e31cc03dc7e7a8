"""Pictures from text: scale-wise sampling with a key/value cache, and the pipeline around it."""
