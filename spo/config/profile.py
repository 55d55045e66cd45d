"""A whole profile, and how it is read."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from spo.config.align import MethodConfig, SampledConfig, SpoConfig
from spo.config.base import Key, Positive, Section
from spo.config.evaluate import EvaluateConfig, PromoteConfig
from spo.config.model import FLOW, ModelConfig, SamplingConfig
from spo.config.preference import LabelsConfig, PreferenceConfig, PrepareConfig
from spo.errors import ConfigError, one_line


class SafetyConfig(Section):
    """Settings that protect a run; changing them makes no stage run again and changes no result."""

    save_every_seconds: Annotated[float, Field(ge=0)] = 60.0  # between saved states; longer if saving is slow
    max_skipped_in_a_row: Positive = 10  # non-finite updates before the run ends
    stuck_after: Positive = 20  # updates or rounds that teach nothing before a warning


class LaunchConfig(Section):
    """The processes that share the work of the heavy stages, one for each GPU; results do not depend on them."""

    num_processes: Positive = 1
    shard_network: bool = False  # `align` leaves each process its part of the network, of gradients and of moments
    accelerate_config: str | None = None  # a file of `accelerate config`, e.g. for several machines


class Config(Section):
    profile: str
    seed: int = 0
    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("spo",)
    train_preference: Annotated[tuple[Key, ...], Field(min_length=1)] = ("pixel",)  # the preference models to train
    training_seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)  # a run for each
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    prepare: PrepareConfig
    labels: LabelsConfig = LabelsConfig()
    preference_models: dict[Key, PreferenceConfig]
    align: dict[Key, MethodConfig]
    evaluate: EvaluateConfig
    safety: SafetyConfig = SafetyConfig()
    promote: PromoteConfig = PromoteConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def counted_sampling(self) -> SamplingConfig:
        """The sampler with the guidance that costs forwards; FLUX's costs none."""
        return self.sampling.model_copy(update={"guidance_scale": 1.0}) if self.model.is_distilled else self.sampling

    def scorer_of(self, method: str) -> str:
        """The preference model that watches the training of `method`: its own, or else the first one."""
        return self.align[method].scorer or self.train_preference[0]

    def labels_of(self, preference_model: str) -> LabelsConfig:
        """The labels that a preference model learns from."""
        return self.preference_models[preference_model].labels or self.labels

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for name, method in self.align.items():
            if problem := method.misfit(self.sampling):
                raise ValueError(f"align.{name}.{problem}")
            if not isinstance(method, SampledConfig):
                continue
            keys = ("preference_model", "late.preference_model")
            for key, scorer in zip(keys, method.scorers, strict=False):
                if scorer not in self.preference_models:
                    known = sorted(self.preference_models)
                    raise ValueError(f"align.{name}.{key}={scorer!r} is none of {known}")
                if name in self.methods and scorer not in self.train_preference:
                    raise ValueError(
                        f"align.{name} needs the preference model {scorer!r}, which train_preference in params.yaml "
                        f"does not name; got {[*self.train_preference]}, so add it"
                    )
                ahead = getattr(method, "look_ahead", 0)
                if ahead and not self.preference_models[scorer].reads_x_0:
                    raise ValueError(
                        f"align.{name}.look_ahead={ahead} needs a preference model that scores the predicted x_0; "
                        f"{scorer!r} scores noisy latents, so set it to 0"
                    )
            if problem := self.preference_models[method.scorer].unfit(method.scoring):
                raise ValueError(f"align.{name}.scoring.{problem}")
        for name, preference in self.preference_models.items():
            if self.prepare.preferences is None and not preference.is_trained:
                raise ValueError(
                    "prepare.preferences is missing: name preference pairs to train on, or a trained preference model "
                    f"in preference_models.{name}.checkpoint"
                )
        if problem := self._family_misfit():
            raise ValueError(problem)
        if taken := [name for name in self.evaluate.published if name in ("base", "contrast", *self.align)]:
            raise ValueError(f"evaluate.loras and networks: {taken} are names of other columns; name them differently")
        if unknown := sorted(set(self.promote.tolerance) - set(self.evaluate.guarded)):
            raise ValueError(f"promote.tolerance names {unknown}, but guarded are {list(self.evaluate.guarded)}")
        if missing := [name for name in self.methods if name not in self.align]:
            raise ValueError(f"methods names {missing}, but align has only {sorted(self.align)}")
        if self.launch.shard_network and (problem := self.unshardable()):
            raise ValueError(problem)
        if missing := [name for name in self.train_preference if name not in self.preference_models]:
            raise ValueError(
                f"train_preference names {missing}, but preference_models has only {sorted(self.preference_models)}"
            )
        for key in ("methods", "train_preference", "training_seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}={list(values)} repeats a value; name each once")
        return self

    def unshardable(self) -> str | None:
        """A setting that a sharded network does not allow; None if there is none."""
        keys = {f"align.{name}.optimizer.eight_bit": self.align[name].optimizer.eight_bit for name in self.methods}
        keys |= {"model.compile": self.model.compile}
        wrong = next((key for key, value in keys.items() if value), None)
        return wrong and f"{wrong}=true is not possible with launch.shard_network=true; set one of them false"

    def _family_misfit(self) -> str | None:
        """A setting that the model's family cannot use; None if there is none."""
        family, is_flow = self.model.family, self.model.is_flow
        for name, sampler in self.evaluate.samplers.items():
            if (sampler.scheduler == FLOW) != is_flow:
                remedy = FLOW if is_flow else "one of a diffusion model, e.g. DDIMScheduler"
                return f"evaluate.samplers.{name}: scheduler={sampler.scheduler} is not for {family}; use {remedy}"
        if not is_flow:
            noise = self.sampling.noise
            return None if noise == "ddim" else f"sampling.noise={noise} is for sd3 and flux; use ddim for {family}"
        for name, method in self.align.items():
            if isinstance(method, SpoConfig) and method.first_step >= self.sampling.steps - 1:
                return (
                    f"align.{name}.first_step={method.first_step} must be below sampling.steps - 1 = "
                    f"{self.sampling.steps - 1}, since the last step of {family} has no density"
                )
        return None


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
    if isinstance(values.get("train_preference"), dict):
        raise ConfigError(
            f"{path}: the section train_preference is now one of several: preference_models: {{NAME: the section}}"
        )
    if twice := (set(shared) - {"profile"}) & set(values):
        raise ConfigError(f"{sorted(twice)} are in both params.yaml and {path}; keep one of each")
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
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # as DVC reads it: a repeated key is an error
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is no valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; it should hold named sections")
    return values


def _first_line(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        place = item["loc"]
        if place[:1] == ("align",):  # pydantic also names the method's kind: align.NAME.KIND.KEY
            place = (*place[:2], *place[3:])
        if place[:1] == ("preference_models",):
            place = (*place[:2], *place[3:])
        if place[:1] == ("align",) and place[2:3] == ("threshold",):
            place = (*place[:3], *place[4:])
        where = ".".join(str(part) if str(part).isprintable() else repr(part) for part in place)
        got = "" if item["type"] in ("missing", "value_error") else f", got {item['input']!r}"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        problems.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(problems)
