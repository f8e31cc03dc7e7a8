"""A page and a batch API to draw with a trained model: `star-dist serve DIR`."""
