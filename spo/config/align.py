"""The methods, and what each trains with."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spo.config.base import Fraction, Positive, Rate, Section
from spo.config.metrics import MetricConfig


class LoraConfig(Section):
    """alpha = rank, gaussian start, on the attention projections."""

    rank: Positive = 4
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class OptimizerConfig(Section):
    """AdamW; the published SPO's rate is constant, and it never clips, though it says it does."""

    learning_rate: Rate = 6e-5
    warmup_updates: Annotated[int, Field(ge=0)] = 0  # over which the rate rises linearly
    schedule: Literal["constant", "linear"] = "constant"  # linear: down to 0 over the rounds
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    eight_bit: bool = False


class WatchConfig(Section):
    """Pictures of the same few validation prompts while training, seen by the preference model and a metric."""

    every: Positive  # rounds; there is also a look at the start
    num_prompts: Annotated[int, Field(ge=2)] = 16
    seed: int = 4321
    metric: MetricConfig  # independent: the training never sees it
    score: str  # the one of the metric's scores that counts
    stop_after_worse: Positive | None = None  # looks in a row below the best one that end the run; None: never

    @model_validator(mode="after")
    def _score_exists(self) -> "WatchConfig":
        if self.score not in self.metric.scores:
            raise ValueError(f"watch.score must be one of the metric's, {list(self.metric.scores)}; got {self.score!r}")
        return self


class AlignConfig(Section):
    """What every method has: how the loop trains on its pairs."""

    epochs: Positive = 10
    beta: Rate = 10.0
    batch_size: Positive = 40  # pairs an update
    micro_batch_size: Positive | None = None  # pairs in memory at a time; None: all of an update's
    checkpoints: Positive = 4  # saved along the way, for evaluation to choose from
    full_fine_tuning: bool = False
    watch: WatchConfig | None = None  # None: nobody looks before `evaluate`
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class ScoringConfig(Section):
    """How candidates are judged; anything but the defaults saves time and changes some labels: docs/performance.md."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the preference model
    tiny_vae: str | None = None  # an AutoencoderTiny to decode for the judge alone, e.g. madebyollin/taesd


class SampledConfig(AlignConfig):
    """What the methods have that sample the policy: which of the pairs they keep, and how far a ratio may move."""

    rollouts_per_epoch: Positive | None = None  # None: every training prompt once an epoch
    prompts_per_rollout: Positive = 40
    threshold: Fraction = 0.3  # margin above which a pair is kept
    clip_range: Annotated[float, Field(gt=0, lt=1)] | None = 0.1
    scoring: ScoringConfig = ScoringConfig()


class SpoConfig(SampledConfig):
    """SPO (paper section 4; published settings for SD 1.5 as defaults)."""

    method: Literal["spo"] = "spo"
    candidates: Annotated[int, Field(ge=2)] = 4
    first_step: Annotated[int, Field(ge=0)] = 4
    branch_steps: Positive = 1
    continue_from: Literal["random", "win", "lose"] = "random"
    pairing: Literal["best_worst", "random"] = "best_worst"
    judged_at: Annotated[int, Field(ge=0)] | None = None  # told to the preference model as every t: one blind to t


class D3poConfig(SampledConfig):
    """D3PO (arXiv 2311.13231; yk7333/d3po's settings as defaults): whole trajectories, judged at their ends."""

    method: Literal["d3po"] = "d3po"
    threshold: Fraction = 0.0
    beta: Rate = 0.1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-5, max_grad_norm=1.0)


class DiffusionDpoConfig(AlignConfig):
    """Diffusion-DPO (arXiv 2311.12908; SalesforceAIResearch/DiffusionDPO's settings for SD 1.5 as defaults)."""

    method: Literal["diffusion_dpo"] = "diffusion_dpo"
    updates_per_epoch: Positive | None = None  # None: every decided pair once an epoch
    beta: Rate = 5000.0  # of half the mean squared error over (c, h, w), as in the published code
    batch_size: Positive = 2048
    empty_captions: Fraction = 0.2  # share of captions that are dropped
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2.048e-5,  # 1e-8 a pair of the batch
        warmup_updates=500,
        weight_decay=1e-2,
        max_grad_norm=1.0,
    )


MethodConfig = Annotated[SpoConfig | D3poConfig | DiffusionDpoConfig, Field(discriminator="method")]
