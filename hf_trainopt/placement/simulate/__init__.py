"""A training step without memory: fake tensors, what they would take, an example batch to run it on."""
