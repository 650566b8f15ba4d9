"""What a run will need, answered before anything runs: `plan`, and `print_plan` for people."""

from influencespace.plan.planning import Plan, plan
from influencespace.plan.table import print_plan

__all__ = ["Plan", "plan", "print_plan"]
