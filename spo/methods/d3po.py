"""D3PO: pairs of whole trajectories, scored once at their ends (arXiv 2311.13231).

Two trajectories of a prompt start from one initial noise and separate at the first step; each step of the trajectory
with the better end is a win. This is SPO's rollout with two candidates and one segment as long as the sampler.
"""

from typing import Any

from spo.config import D3poConfig
from spo.methods.sampled import PairMethod


class D3po(PairMethod[D3poConfig]):
    """D3PO: two trajectories, scored at their ends by the preference model; the published method asks people."""

    def rollout_settings(self) -> dict[str, Any]:
        return {"candidates": 2, "first_step": 0, "branch_steps": len(self.policy.timesteps)}


METHOD = D3po
