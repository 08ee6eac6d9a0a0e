"""Models by name: the config and weights of transformers and timm, and clear errors where the Hub has none."""
