"""What a run will need, answered before it runs: `plan`, and `print_plan` for people."""

from influencespace.planning.planning import Plan, plan
from influencespace.planning.table import print_plan

__all__ = ["Plan", "plan", "print_plan"]
