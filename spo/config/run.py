"""How stages run, which changes no result."""

from typing import Annotated

from pydantic import Field

from spo.config.base import Positive, Section


class SafetyConfig(Section):
    """What keeps a run from being lost; none of it changes a result, so no stage runs anew for it."""

    save_every_seconds: Annotated[float, Field(ge=0)] = 60.0  # of a run's state; less often where saving is slow
    max_skipped_in_a_row: Positive = 10  # updates with a loss or gradient that is not finite, before the run ends
    stuck_after: Positive = 20  # updates or rollouts in a row without a sign of learning, before a warning


class LaunchConfig(Section):
    """How many processes share the heavy stages' work, one a GPU; results do not depend on it, so none runs anew."""

    num_processes: Positive = 1
    accelerate_config: str | None = None  # a file that `accelerate config` wrote, e.g. for several machines
