"""The settings of every stage: `params.yaml` names a profile, `configs/<profile>.yaml` holds it whole.

Each section belongs to one stage or component. Unknown keys are errors, nothing is changed after loading,
and a default cites the paper (arXiv 2406.04314) or the published configuration where it comes from one.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spo.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # of a column and of its folder


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The diffusion model to align: a diffusers repository by hub name or local folder."""

    family: Literal["sd15", "sdxl"]
    path: str
    revision: str | None = None
    variant: str | None = None  # e.g. fp16
    vae: str | None = None  # another VAE, e.g. madebyollin/sdxl-vae-fp16-fix
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    resolution: Positive  # pixels; height and width
    gradient_checkpointing: bool = False


class SamplingConfig(Section):
    """The DDIM sampler of SPO's rollout; the paper's is 20 steps, eta 1, guidance 5."""

    steps: Positive = 20
    eta: Fraction = 1.0
    guidance_scale: Annotated[float, Field(ge=1)] = 5.0


class PromptsConfig(Section):
    source: str  # a .txt, .json, .jsonl, .csv, .tsv or .parquet file
    field: str | None = None  # of the prompt, where rows have fields
    max_prompts: Positive | None = None


class PreferencesConfig(Section):
    source: str  # a folder or file of JSON Lines or parquet, or hub:NAME
    split: str = "train"  # of a hub data set
    max_pairs: Positive | None = None


class PrepareConfig(Section):
    prompts: PromptsConfig
    preferences: PreferencesConfig | None = None  # None: no pairs, for a preference model that is trained already
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2


class LabelsConfig(Section):
    """Where the preference model's labels come from: people, or a clean-image model's opinion (SDXL's recipe)."""

    kind: Literal["human", "pseudo"] = "human"
    model: str | None = None  # of pseudo-labels: a CLIP repository such as yuvalkirstain/PickScore_v1
    processor: str | None = None  # tokenizer's repository, where `model` has none
    tie_margin: Fraction = 0.1  # softmax gap below which a pseudo-label is a tie

    @model_validator(mode="after")
    def _pseudo_needs_model(self) -> "LabelsConfig":
        if (self.kind == "pseudo") != (self.model is not None):
            raise ValueError(
                "labels.kind=pseudo needs labels.model, e.g. yuvalkirstain/PickScore_v1, and kind=human has none"
            )
        return self


class TrainPreferenceConfig(Section):
    """The step-aware preference model (paper section 4.1; SD 1.5: 8000 steps at 3e-6)."""

    start_from: str  # a CLIP repository: PickScore, or the embedded default's
    checkpoint: str | None = None  # an already trained step-aware model: skips training
    processor: str | None = None  # tokenizer's repository, where start_from has none
    steps: Positive = 8000
    batch_size: Positive = 64
    learning_rate: Rate = 3e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    weight_decay: Annotated[float, Field(ge=0)] = 0.3
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    preprocessing: Literal["antialias", "published"] = "antialias"
    blind: bool = False  # to t, which it is then told is 0 in training and in use: the paper's ablation
    labels: LabelsConfig = LabelsConfig()
    evaluate_timesteps: tuple[int, ...] = (0, 251, 501, 701, 951)  # as published
    evaluate_pairs: Positive = 512  # validation pairs that accuracy is measured on, at most
    log_every: Positive = 20


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


class OracleConfig(Section):
    """The judge of the drawn world; its scores are `aesthetic`, `alignment` and their factors."""

    kind: Literal["oracle"] = "oracle"

    @property
    def scores(self) -> tuple[str, ...]:
        return ("aesthetic", "alignment")


class ClipMetricConfig(Section):
    """A CLIP's score of image and prompt: PickScore, CLIPScore and their like, named by their repository."""

    kind: Literal["clip"] = "clip"
    name: str  # of the score, e.g. pickscore
    model: str  # a CLIP repository
    processor: str | None = None  # tokenizer's repository, where `model` has none

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.name,)


class HpsConfig(Section):
    """HPSv2.1, as published: an OpenCLIP checkpoint, and the CLIP whose configuration and tokenizer it has."""

    kind: Literal["hpsv2"] = "hpsv2"
    name: str = "hpsv2"
    weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"  # a file here, or OWNER/NAME/FILE of the hub
    clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.name,)


class AestheticConfig(Section):
    """LAION's aesthetic predictor: published linear layers on the features of a CLIP."""

    kind: Literal["laion_aesthetic"] = "laion_aesthetic"
    name: str = "laion_aesthetic"
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"  # a file here, or OWNER/NAME/FILE of the hub
    clip: str = "openai/clip-vit-large-patch14"

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.name,)


class ImageRewardConfig(Section):
    """ImageReward, as published, and the tokenizer of its text encoder."""

    kind: Literal["image_reward"] = "image_reward"
    name: str = "image_reward"
    weights: str = "THUDM/ImageReward/ImageReward.pt"  # a file here, or OWNER/NAME/FILE of the hub
    tokenizer: str = "google-bert/bert-base-uncased"

    @property
    def scores(self) -> tuple[str, ...]:
        return (self.name,)


MetricConfig = Annotated[
    OracleConfig | ClipMetricConfig | HpsConfig | AestheticConfig | ImageRewardConfig, Field(discriminator="kind")
]


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


class LoraSource(Section):
    """Somebody else's LoRA: a folder, a .safetensors file or a hub repository; a plain string is its `source`."""

    source: str
    weight_name: str | None = None  # of the file, where a folder or repository has several
    revision: str | None = None  # of a hub repository

    @model_validator(mode="before")
    @classmethod
    def _named_plainly(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value


class EvaluateConfig(Section):
    num_prompts: Positive  # of the test split, each with `images_per_prompt` seeds
    num_validation_prompts: Positive  # on which each method's checkpoint is chosen
    images_per_prompt: Positive = 1
    steps: Positive = 20
    guidance_scale: Annotated[float, Field(ge=1)] = 5.0
    etas: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.0, 1.0)  # the samplers; the first one decides
    batch_size: Positive = 64
    seed: int = 1234
    metrics: Annotated[tuple[MetricConfig, ...], Field(min_length=1)]
    primary: str  # the score that is to rise
    guarded: tuple[str, ...] = ()  # scores that must not fall
    guard_tolerance: Annotated[float, Field(ge=0)] = 0.005  # fall of a guarded mean that choosing forgives
    loras: dict[Name, LoraSource] = {}  # published LoRAs to compare with, as columns of these names
    bootstrap_samples: Positive = 10_000

    @model_validator(mode="after")
    def _scores_exist(self) -> "EvaluateConfig":
        known = [name for metric in self.metrics for name in metric.scores]
        for name in (self.primary, *self.guarded):
            if name not in known:
                raise ValueError(f"primary and guarded name scores of the metrics, {known}; got {name!r}")
        return self


class SafetyConfig(Section):
    """What keeps a run from being lost; none of it changes a result, so no stage runs anew for it."""

    save_every_seconds: Annotated[float, Field(ge=0)] = 60.0  # of a run's state; less often where saving is slow
    max_skipped_in_a_row: Positive = 10  # updates with a loss or gradient that is not finite, before the run ends
    stuck_after: Positive = 20  # updates or rollouts in a row without a sign of learning, before a warning


class PromoteConfig(Section):
    """When a new LoRA becomes champion: see spo/evaluation/promotion.py; primary and guarded are evaluate's."""

    method: str | None = None  # whose released LoRA is the candidate; None: the first of `methods`
    tolerance: dict[str, Annotated[float, Field(ge=0)]] = {}
    # of a guarded score: how far the 95% interval of its change may reach below zero, in that score's units;
    # of one that is not named here: evaluate.guard_tolerance


class LaunchConfig(Section):
    """How many processes share the heavy stages' work, one a GPU; results do not depend on it, so none runs anew."""

    num_processes: Positive = 1
    accelerate_config: str | None = None  # a file that `accelerate config` wrote, e.g. for several machines


class Config(Section):
    profile: str
    seed: int = 0
    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("spo",)
    training_seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)  # each aligns anew
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    prepare: PrepareConfig
    train_preference: TrainPreferenceConfig
    align: dict[Name, MethodConfig]
    evaluate: EvaluateConfig
    safety: SafetyConfig = SafetyConfig()
    promote: PromoteConfig = PromoteConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for name, method in self.align.items():
            if not isinstance(method, SpoConfig):
                continue
            branched = self.sampling.steps - method.first_step
            if branched <= 0:
                raise ValueError(
                    f"align.{name}.first_step={method.first_step} must be below sampling.steps={self.sampling.steps}"
                )
            if branched % method.branch_steps:
                allowed = [n for n in range(1, branched + 1) if branched % n == 0]
                raise ValueError(
                    f"align.{name}.branch_steps={method.branch_steps} must divide "
                    f"sampling.steps - first_step = {branched}; use one of {allowed}"
                )
        if self.prepare.preferences is None and self.train_preference.checkpoint is None:
            raise ValueError(
                "prepare.preferences is missing: name preference pairs to train on, or a trained preference model in "
                "train_preference.checkpoint"
            )
        taken = [name for name in self.evaluate.loras if name in ("base", "contrast", *self.align)]
        if taken:
            raise ValueError(f"evaluate.loras: {taken} are names of other columns; name the LoRAs differently")
        strangers = sorted(set(self.promote.tolerance) - set(self.evaluate.guarded))
        if strangers:
            raise ValueError(f"promote.tolerance names {strangers}, but guarded are {list(self.evaluate.guarded)}")
        missing = [name for name in self.methods if name not in self.align]
        if missing:
            raise ValueError(f"methods names {missing}, but align has only {sorted(self.align)}")
        for key, values in {"methods": self.methods, "training_seeds": self.training_seeds}.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{key}={list(values)} names one of them twice; name each once")
        return self

    def folder(self, stage: str) -> Path:
        """Where a stage writes, relative to the project: runs/<profile>/<stage>."""
        return Path("runs") / self.profile / stage

    def aligned(self, method: str, seed: int) -> Path:
        """Where `align` writes what a method comes to from a training seed, relative to the project."""
        return self.folder("align") / method / f"seed-{seed}"

    def state_folder(self, *job: str) -> Path:
        """Where a job (stage, method, seed) keeps what it goes on from when stopped; nothing that DVC looks at."""
        return Path(".cache") / "state" / Path(self.profile, *job)


def load_config(root: Path = Path(), profile: str | None = None) -> Config:
    """Read params.yaml and the profile it names (or `profile`); ConfigError in one line if anything is wrong."""
    shared = _read_yaml(root / "params.yaml")
    name = profile or shared.get("profile")
    if not isinstance(name, str):
        raise ConfigError(f"params.yaml: profile is {name!r}; name one of {_profiles(root)}")
    path = root / "configs" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"profile {name!r} has no {path}; there are {_profiles(root)}")
    values = _read_yaml(path)
    twice = (set(shared) - {"profile"}) & set(values)
    if twice:
        raise ConfigError(f"{sorted(twice)} stand in both params.yaml and {path}; keep one of each")
    try:
        return Config.model_validate({**shared, **values, "profile": name})
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from None


def _profiles(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "configs").glob("*.yaml"))


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; run from the project's folder")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; it should hold named sections")
    return values


def _first_line(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        place = item["loc"]
        if place[:1] == ("align",):  # of a method, pydantic also names the kind: align.NAME.KIND.KEY
            place = (*place[:2], *place[3:])
        where = ".".join(str(part) if str(part).isprintable() else repr(part) for part in place)
        got = "" if item["type"] in ("missing", "value_error") else f", got {item['input']!r}"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        problems.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(problems)
