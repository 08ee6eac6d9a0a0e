"""Runs the parts: their list in order, one optimizer step, the events that they hear."""
