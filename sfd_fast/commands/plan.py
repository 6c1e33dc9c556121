"""`sfd plan`: memory per GPU and a lower bound of step time, before renting the GPUs."""

from sfd_fast.config.planning import PlanConfig


def run_plan(config: PlanConfig) -> None:
    """Prints what fits and what does not. ValueError as plan()."""
    from sfd_fast.planning.plan import plan
    from sfd_fast.planning.table import format_plan

    print(format_plan(plan(config)))
