"""Error budgets: how far a kernel may be from float64, per operator and numerics class.

`judge` compares what a kernel returned with what it should have; `rule` says in words what it is held to. Expected values
are computed in float64 on the CPU from the quantised inputs, so that quantisation loss is not charged to a product. No
budget depends on the backend: a kernel declares its numerics class, and that is all that widens one.
"""

from dsv3.budget.judge import expect, judge, rule
from dsv3.budget.verdict import Verdict

__all__ = ["Verdict", "expect", "judge", "rule"]
