"""The stages of `run.py`, one module each."""
