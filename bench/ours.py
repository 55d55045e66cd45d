"""One SPO batch by the project's own path, `spo.training.align.align`, watched."""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.systems import System, attach_lora
from spo.core.types import Pairs
from spo.methods.method import Round
from spo.methods.spo import Spo
from spo.preference.latent_checkpoint import LatentPreference
from spo.preference.latent_score import LatentScorer
from spo.preference.score import PreferenceScorer
from spo.tracking import NullTracker
from spo.training.align import align


class OurPath:
    """The batch of a system; attaches the system's LoRA.

    kind: of the preference model. "pixel" is the system's own, "latent" one of random weights on the policy's network.
    """

    def __init__(self, system: System, *, seed: int, kind: str = "pixel"):
        self.scorer: Any
        if kind == "latent":
            self.scorer = latent_scorer(system)
        else:
            self.scorer = PreferenceScorer(system.preference, device=system.policy.device)
        attach_lora(system)
        self.policy, self.settings, self.seed = system.policy, system.settings, seed
        self.method = Spo(system.settings, system.policy, self.scorer, system.prompts, seed=seed)
        self.pairs: list[Pairs] = []
        self.metrics: dict[str, Any] = {}  # align's own, of the last run
        collect = self.method.collect

        def recorded(epoch: int, *, skip: int = 0) -> Iterator[Round]:
            for round_ in collect(epoch, skip=skip):
                if isinstance(round_.examples, Pairs):
                    self.pairs.append(round_.examples)
                yield round_

        self.method.collect = recorded  # type: ignore[method-assign]

    def rehearse(self) -> None:
        """Run the batch once, and leave no trace: what compiles when it is first called is then compiled."""
        parameters = self.policy.network.parameters()
        before = [parameter.detach().clone() for parameter in parameters]
        self.run()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)

    def run(self) -> tuple[dict[str, Tensor], list[float]]:
        """Align for one batch: its pairs (x_t, x_prev, t, t_prev) and each update's loss."""
        with tempfile.TemporaryDirectory() as folder:
            self.metrics = align(self.method, self.policy, self.settings, Path(folder), NullTracker(), seed=self.seed)
            with (Path(folder) / "history.csv").open(newline="", encoding="utf-8") as file:
                losses = [float(row["loss"]) for row in csv.DictReader(file)]
        (pairs,) = self.pairs
        self.pairs.clear()
        return {"x_t": pairs.x_t, "x_prev": pairs.x_prev, "t": pairs.t, "t_prev": pairs.t_prev}, losses


def latent_scorer(system: System) -> LatentScorer:
    """A latent preference model at the start of its training, without guidance for `tiny`, else with the published."""
    policy = system.policy
    preference = LatentPreference.from_pipeline(
        policy.network.pipeline,
        vae=policy.autoencoder.vae,
        guidance_scale=system.latent_guidance_scale,
        generator=torch.Generator().manual_seed(0),
    )

    def count(forwards: float) -> None:
        policy.network.forwards += forwards

    return LatentScorer(preference, device=policy.device, autoencoder=policy.autoencoder, count=count)
