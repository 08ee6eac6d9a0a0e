"""Checkpoint placement: which activations are stored and which are recomputed, for a memory budget.

The data flow one way: `replay.py` measures whole steps without memory (with `fake.py`, `tracker.py`, `costs.py`),
`options.py` and `chain.py` make a chain of stages of it, `solver.py` decides, `planner.py` verifies; `apply.py` puts
the plan on a model (with `regions.py`, `runs.py`, `selective.py`, `batchnorm.py`, `rewrites.py`); `trainer.py` does
all of it in `Trainer`, `cli.py` on the command line.
"""

from .apply import AppliedPlacement, apply_placement
from .errors import PlacementError
from .plan import PlacementPlan, Rewrites, StageChoice
from .planner import PlacementPlanner, plan_placement
from .replay import StepSetup


__all__ = [
    "AppliedPlacement",
    "PlacementError",
    "PlacementPlan",
    "PlacementPlanner",
    "Rewrites",
    "StageChoice",
    "StepSetup",
    "apply_placement",
    "plan_placement",
]
