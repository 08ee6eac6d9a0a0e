"""From replays and a budget to a plan: options, chain, solver, planner; plans of named policies and of runs."""
