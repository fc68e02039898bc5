"""Models: configuration, parameters, key/value cache, batches and the forward pass."""
