"""The alignment methods and their settings."""

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from spo.config.base import Fraction, Name, Positive, Rate, Section
from spo.config.metrics import MetricConfig
from spo.config.model import SamplingConfig


class LoraConfig(Section):
    """A LoRA on the attention projections, with alpha = rank and a gaussian start."""

    rank: Positive = 4
    targets: tuple[str, ...] = (  # diffusers' LoRA scripts; the second row is the text's part of SD3 and FLUX
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )


class OptimizerConfig(Section):
    """AdamW; the published SPO code has a constant rate and never clips gradients, although its settings say so."""

    learning_rate: Rate = 6e-5
    warmup_updates: Annotated[int, Field(ge=0)] = 0  # the rate rises linearly over these
    schedule: Literal["constant", "linear"] = "constant"  # linear: the rate falls to 0 over the rounds
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    eight_bit: bool = False  # Adam's moments take 8 bits each, which needs bitsandbytes


class WatchConfig(Section):
    """Images of a few validation prompts during training, scored by the preference model and by a metric."""

    every: Positive  # rounds; the first look is at the start
    num_prompts: Annotated[int, Field(ge=2)] = 16
    seed: int = 4321
    metric: MetricConfig  # independent: the training never sees it
    score: str  # the score of the metric to use
    stop_after_worse: Positive | None = None  # ends the run after so many looks below the best one; None: never

    @model_validator(mode="after")
    def _score_exists(self) -> "WatchConfig":
        if self.score not in self.metric.scores:
            raise ValueError(f"watch.score must be one of {list(self.metric.scores)}; got {self.score!r}")
        return self


class AlignConfig(Section):
    """The settings of every method, and what other parts of the program need to know about a method.

    The method of kind `spo` is in spo/methods/spo.py. A new method needs only such a module, its section here and a
    profile.
    """

    needs_pairs: ClassVar[bool] = False  # labelled preference pairs

    epochs: Positive = 10
    batch_size: Positive = 40  # examples in an update
    micro_batch_size: Positive | None = None  # examples in memory at a time; None: the whole update
    checkpoints: Positive = 4  # saved during the training; evaluation chooses one
    full_fine_tuning: bool = False
    watch: WatchConfig | None = None
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def scorer(self) -> str | None:
        """The preference model that scores the method's samples; None if it needs none."""
        return None

    @property
    def scorers(self) -> tuple[str, ...]:
        """All preference models that score the method's samples, `scorer` first."""
        return () if self.scorer is None else (self.scorer,)

    def sampling(self, sampling: SamplingConfig) -> SamplingConfig:
        """The sampler of the policy, from the profile's sampler."""
        return sampling

    def misfit(self, sampling: SamplingConfig) -> str | None:
        """A setting that does not fit the sampler, as `key=value must ...`; None if all fit."""
        return None

    def repositories(self) -> dict[str, str]:
        """Other models that the method loads: keys of its section, and folders or hub names."""
        return {}

    def memory_remedy(self) -> str:
        """What to change if collecting examples runs out of memory."""
        return "set model.dtype to bfloat16, or use a smaller model.resolution"

    def empty_remedy(self, margin: float) -> str:
        """Why a whole epoch kept no example, and what to change; margin: the mean margin."""
        return "the data holds no example to train on"

    def miniature(self, *, examples: int, prompts: int) -> dict[str, Any]:
        """Changed settings for `check`: two rounds from few prompts, the first of which also warms up."""
        at_a_time = min(self.micro_batch_size or self.batch_size, examples)
        small = {"epochs": 2, "batch_size": at_a_time, "micro_batch_size": None, "checkpoints": 1}
        return small | ({"watch": self.watch.model_dump() | {"num_prompts": 2}} if self.watch else {})

    def forwards(self, *, num_prompts: float, num_pairs: float, per_prompt: Callable[[], float]) -> float:
        """Network forwards (samples) of a training; per_prompt: measured for a prompt that is sampled once."""
        return 0.0


class ScoringConfig(Section):
    """How candidates are scored; other values than the defaults change some labels (docs/performance.md)."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the preference model
    tiny_vae: str | None = None  # an AutoencoderTiny that decodes for the preference model, e.g. madebyollin/taesd
    timestep: Annotated[int, Field(ge=0)] | None = None  # the preference model gets it instead of every t
    at_step_time: bool = False  # latent models: score a candidate at the time its step started from, as LPO's code does


class RisingThreshold(Section):
    """LPO's threshold: `low` at the step with the least std, `high` at that with the most (spo/core/threshold.py)."""

    low: Fraction
    high: Fraction
    by: Literal["std"] = "std"

    @model_validator(mode="after")
    def _rises(self) -> "RisingThreshold":
        if self.low > self.high:
            raise ValueError(f"low={self.low} must not be above high={self.high}")
        return self


def _is_rising(value: Any) -> str:
    return "rising" if isinstance(value, (dict, RisingThreshold)) else "number"


Threshold = Annotated[
    Annotated[Fraction, Tag("number")] | Annotated[RisingThreshold, Tag("rising")], Discriminator(_is_rising)
]


class SampledConfig(AlignConfig):
    """The settings of methods that sample the policy and have a preference model score the samples."""

    rollouts_per_epoch: Positive | None = None  # None: each training prompt once in an epoch
    prompts_per_rollout: Positive = 40
    preference_model: Name = "pixel"  # a key of the profile's preference_models
    scoring: ScoringConfig = ScoringConfig()

    @property
    def scorer(self) -> str:
        return self.preference_model

    def repositories(self) -> dict[str, str]:
        return {"scoring.tiny_vae": self.scoring.tiny_vae} if self.scoring.tiny_vae else {}

    def memory_remedy(self) -> str:
        return f"lower the method's prompts_per_rollout, now {self.prompts_per_rollout}"

    def miniature(self, *, examples: int, prompts: int) -> dict[str, Any]:
        small = super().miniature(examples=examples, prompts=prompts)
        return small | {"rollouts_per_epoch": 1, "prompts_per_rollout": prompts}

    def forwards(self, *, num_prompts: float, num_pairs: float, per_prompt: Callable[[], float]) -> float:
        most = (self.rollouts_per_epoch or num_prompts) * self.prompts_per_rollout
        return self.epochs * min(num_prompts, most) * per_prompt()


class PairConfig(SampledConfig):
    """The settings of methods that make pairs of the samples."""

    pairs_at_random: ClassVar[bool] = False

    threshold: Threshold = 0.3  # margin above which a pair is kept
    beta: Rate = 10.0
    clip_range: Annotated[float, Field(gt=0, lt=1)] | None = 0.1  # of the ratio of policy and reference, around 1

    def empty_remedy(self, margin: float) -> str:
        return (
            f"threshold={self.threshold}, but the mean margin is {margin:.3g}; lower the method's threshold, or train "
            "the preference model for longer"
        )

    def miniature(self, *, examples: int, prompts: int) -> dict[str, Any]:
        return super().miniature(examples=examples, prompts=prompts) | {"threshold": 0.0}


class LateConfig(Section):
    """Another preference model, which scores the candidates at times up to `at_most` (spo/preference/by_time.py)."""

    preference_model: Name  # a key of the profile's preference_models
    at_most: Annotated[float, Field(ge=0, lt=1000)]


class SpoConfig(PairConfig):
    """SPO (paper section 4; published settings for SD 1.5 as defaults)."""

    method: Literal["spo"] = "spo"
    candidates: Annotated[int, Field(ge=2)] = 4
    first_step: Annotated[int, Field(ge=0)] = 4
    branch_steps: Positive = 1
    continue_from: Literal["random", "win", "lose"] = "random"
    look_ahead: Annotated[int, Field(ge=0)] = 0  # steps without noise before a candidate is scored; published: 0
    pairing: Literal["best_worst", "random"] = "best_worst"
    late: LateConfig | None = None  # None, as published: one preference model scores at all times

    @property
    def scorers(self) -> tuple[str, ...]:
        return (*super().scorers, *([self.late.preference_model] if self.late else []))

    @property
    def pairs_at_random(self) -> bool:  # type: ignore[override]
        return self.pairing == "random"

    def misfit(self, sampling: SamplingConfig) -> str | None:
        if isinstance(self.threshold, RisingThreshold) and (sampling.eta == 0 or sampling.steps == 1):
            return "threshold rises with the steps' std; use a number, or sampling.eta above 0 and 2 or more steps"
        branched = sampling.steps - self.first_step
        if branched <= 0:
            return f"first_step={self.first_step} must be below sampling.steps={sampling.steps}"
        if branched % self.branch_steps:
            allowed = [n for n in range(1, branched + 1) if branched % n == 0]
            return (
                f"branch_steps={self.branch_steps} must divide sampling.steps - first_step = {branched}; "
                f"use one of {allowed}"
            )
        return None


class D3poConfig(PairConfig):
    """D3PO (arXiv 2311.13231; yk7333/d3po's settings as defaults): whole trajectories, scored at their ends."""

    method: Literal["d3po"] = "d3po"
    threshold: Fraction = 0.0
    beta: Rate = 0.1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-5, max_grad_norm=1.0)


class GroupConfig(SampledConfig):
    """The settings of methods that weight samples by their advantage over a group (GRPO, arXiv 2402.03300)."""

    clip_range: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # of the ratio to the policy that sampled, around 1
    kl_weight: Annotated[float, Field(ge=0)] = 0.0  # of the divergence from the reference; above 0 it costs a forward
    max_advantage: Rate = 5.0  # advantages are clamped to this
    optimizer: OptimizerConfig = OptimizerConfig(max_grad_norm=1.0)

    def misfit(self, sampling: SamplingConfig) -> str | None:
        if sampling.eta == 0:
            return "a policy gradient needs the densities of noisy steps; set sampling.eta above 0"
        return None


class GrpoConfig(GroupConfig):
    """GRPO of whole trajectories (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)."""

    method: Literal["grpo"] = "grpo"
    candidates: Annotated[int, Field(ge=2)] = 8  # trajectories of a prompt: the group


class StepGrpoConfig(GroupConfig):
    """GRPO of single steps: the group is the candidates of one x_t, as in SPO."""

    method: Literal["step_grpo"] = "step_grpo"
    candidates: Annotated[int, Field(ge=2)] = 4  # of one x_t: the group
    first_step: Annotated[int, Field(ge=0)] = 0
    look_ahead: Annotated[int, Field(ge=0)] = 0  # steps without noise before a candidate is scored

    def misfit(self, sampling: SamplingConfig) -> str | None:
        if self.first_step >= sampling.steps:
            return f"first_step={self.first_step} must be below sampling.steps={sampling.steps}"
        return super().misfit(sampling)


class DiffusionDpoConfig(AlignConfig):
    """Diffusion-DPO (arXiv 2311.12908; SalesforceAIResearch/DiffusionDPO's settings for SD 1.5 as defaults)."""

    needs_pairs: ClassVar[bool] = True

    method: Literal["diffusion_dpo"] = "diffusion_dpo"
    updates_per_epoch: Positive | None = None  # None: each decided pair once in an epoch
    beta: Rate = 5000.0  # of half the mean squared error over (c, h, w), as in the published code
    batch_size: Positive = 2048
    empty_captions: Fraction = 0.2  # share of captions that are dropped
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2.048e-5,  # 1e-8 for each pair of the batch
        warmup_updates=500,
        weight_decay=1e-2,
        max_grad_norm=1.0,
    )

    def sampling(self, sampling: SamplingConfig) -> SamplingConfig:
        return sampling.model_copy(update={"guidance_scale": 1.0})  # it trains without guidance

    def miniature(self, *, examples: int, prompts: int) -> dict[str, Any]:
        return super().miniature(examples=examples, prompts=prompts) | {"updates_per_epoch": 1}

    def forwards(self, *, num_prompts: float, num_pairs: float, per_prompt: Callable[[], float]) -> float:
        """Two images a pair, through policy and reference."""
        most = self.updates_per_epoch * self.batch_size if self.updates_per_epoch else math.inf
        return 4.0 * self.epochs * min(num_pairs, most)


MethodConfig = Annotated[
    SpoConfig | D3poConfig | GrpoConfig | StepGrpoConfig | DiffusionDpoConfig, Field(discriminator="method")
]
