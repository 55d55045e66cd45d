"""SPO: pairs from single denoising steps of the policy, scored at every step (arXiv 2406.04314)."""

from typing import Any

from spo.config import SpoConfig
from spo.methods.sampled import PairMethod


class Spo(PairMethod[SpoConfig]):
    """SPO: candidates of one step, scored at every step."""

    def rollout_settings(self) -> dict[str, Any]:
        return self.config.model_dump(
            include={"candidates", "first_step", "branch_steps", "continue_from", "look_ahead"}
        )


METHOD = Spo
