"""`sfd plan`: memory per GPU and a lower bound of step time, before renting the GPUs."""

from sfd_fast.planning.plan import PlanConfig, plan
from sfd_fast.planning.table import format_plan


def run_plan(config: PlanConfig) -> None:
    """Prints what fits and what does not. ValueError as plan()."""
    print(format_plan(plan(config)))
