"""Peaks with `expandable_segments:True`: does the allocator waste less, and do plans run within lower limits?"""

from typing import Any

import torch
from cases import TIMED, cases
from common import Context, Record

from .memory import measure_cases


PLANS = ("none", "50%", "sqrt", "floor", "50%, rewrites")


def run(context: Context, record: Record, prepared: Any) -> None:
    # The environment of the process, which `stage_list.py` sets, has turned it on.
    measure_cases(context, record, cases(context)[:TIMED], only=PLANS, limited=PLANS)
    if context.on_gpu:
        kept = torch.empty(2**20, device=context.device)
        expandable = all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
        del kept
        record.check("every segment is expandable", expandable)
