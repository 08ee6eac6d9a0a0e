"""A plan put on a model: what is recomputed, exactly."""
