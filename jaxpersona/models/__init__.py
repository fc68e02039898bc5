"""The model as data and a pure function: its shape, parameters, cache, batches and forward pass."""
