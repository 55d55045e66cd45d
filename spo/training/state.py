"""All that a run of alignment changes, and how it is put on disk and back."""

from dataclasses import asdict, dataclass, field

import torch

from spo.models.latent_diffusion import LatentDiffusion
from spo.runtime import checkpoint
from spo.runtime.checkpoint import pack_optimizer, unpack_optimizer
from spo.training.guards import FiniteGuard
from spo.training.history import Cost, History
from spo.training.scaling import LossScale


@dataclass
class State:
    """All that the loop changes beside the policy's weights; `cost.rounds` says where the run stands."""

    optimizer: torch.optim.Optimizer
    guard: FiniteGuard
    scale: LossScale
    cost: Cost = field(default_factory=Cost)
    history: History = field(default_factory=History)
    examples_in_epoch: int = 0

    def snapshot(self, policy: LatentDiffusion) -> checkpoint.State:
        """Weights and all the rest as they stand between two rounds, on the CPU."""
        tensors, numbers = pack_optimizer(self.optimizer)
        weights = {f"policy.{i}": parameter.detach() for i, parameter in enumerate(policy.network.parameters())}
        values = {
            "optimizer": numbers,
            "scale": asdict(self.scale),
            "cost": asdict(self.cost),
            "history": self.history.to_json(),
            "examples_in_epoch": self.examples_in_epoch,
        }
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in {**weights, **tensors}.items()}
        return checkpoint.State(self.cost.rounds, copies, values)

    @torch.no_grad()
    def restore(self, policy: LatentDiffusion, saved: checkpoint.State) -> None:
        """Put back what `snapshot` gave."""
        for i, parameter in enumerate(policy.network.parameters()):
            parameter.copy_(saved.tensors[f"policy.{i}"])
        unpack_optimizer(self.optimizer, saved.tensors, saved.values["optimizer"])
        self.scale = LossScale(**saved.values["scale"])
        self.cost = Cost(**saved.values["cost"])
        self.history = History.from_json(saved.values["history"])
        self.examples_in_epoch = saved.values["examples_in_epoch"]
        self.guard.skipped = self.cost.skipped
