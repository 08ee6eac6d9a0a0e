"""The machine that a run is on: what operators cost there, peaks of memory, states of random generators."""
