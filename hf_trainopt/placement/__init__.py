"""Checkpoint placement: which activations are stored and which are recomputed, for a memory budget.

The data flow one way. `simulate/` measures whole steps without memory, `plan/` makes a chain of stages of them, solves
it and verifies the result, `recompute/` and `rewrite/` put the plan on a model. `part.py` does all of it in a run,
`show/` on the command line.
"""

from .errors import PlacementError
from .plan.plan import PlacementPlan, Rewrites, StageChoice
from .plan.plan_model import plan_placement
from .plan.planner import PlacementPlanner
from .recompute.apply import AppliedPlacement, apply_placement
from .simulate.step_setup import StepSetup


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
