"""The same function with less memory and without recomputation."""
