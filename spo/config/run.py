"""How stages run. These settings change no result."""

from typing import Annotated

from pydantic import Field

from spo.config.base import Positive, Section


class SafetyConfig(Section):
    """Settings that protect a run from being lost; changing them makes no stage run again."""

    save_every_seconds: Annotated[float, Field(ge=0)] = 60.0  # saves a run's state; less often where saving is slow
    max_skipped_in_a_row: Positive = 10  # non-finite updates before the run ends
    stuck_after: Positive = 20  # updates or rollouts without a sign of learning before a warning


class LaunchConfig(Section):
    """The number of processes that share the heavy stages' work, one for each GPU; results do not depend on it."""

    num_processes: Positive = 1
    accelerate_config: str | None = None  # a file of `accelerate config`, e.g. for several machines
