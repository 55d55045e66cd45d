"""The settings of every stage: `params.yaml` names a profile, `configs/<profile>.yaml` holds it whole.

Each section belongs to one stage or component. Unknown keys are errors, nothing is changed after loading,
and a default cites the paper (arXiv 2406.04314) or the published configuration where it comes from one.
"""

from spo.config.align import (
    AlignConfig,
    D3poConfig,
    DiffusionDpoConfig,
    LoraConfig,
    MethodConfig,
    OptimizerConfig,
    PairConfig,
    RisingThreshold,
    SampledConfig,
    ScoringConfig,
    SpoConfig,
    WatchConfig,
)
from spo.config.base import Section
from spo.config.evaluate import EvaluateConfig, LoraSource, PromoteConfig, SamplerConfig
from spo.config.metrics import (
    AestheticConfig,
    ClipMetricConfig,
    HpsConfig,
    ImageRewardConfig,
    MetricConfig,
    OneScore,
    OracleConfig,
)
from spo.config.model import ModelConfig, SamplingConfig
from spo.config.preference import (
    LabelsConfig,
    LatentPreferenceConfig,
    PixelPreferenceConfig,
    PreferenceConfig,
    TrainPreferenceConfig,
)
from spo.config.prepare import PreferencesConfig, PrepareConfig, PromptsConfig
from spo.config.profile import Config, load_config
from spo.config.run import LaunchConfig, SafetyConfig

__all__ = [
    "AestheticConfig",
    "AlignConfig",
    "ClipMetricConfig",
    "Config",
    "D3poConfig",
    "DiffusionDpoConfig",
    "EvaluateConfig",
    "HpsConfig",
    "ImageRewardConfig",
    "LabelsConfig",
    "LatentPreferenceConfig",
    "LaunchConfig",
    "LoraConfig",
    "LoraSource",
    "MethodConfig",
    "MetricConfig",
    "ModelConfig",
    "OneScore",
    "OptimizerConfig",
    "OracleConfig",
    "PairConfig",
    "PixelPreferenceConfig",
    "PreferenceConfig",
    "PreferencesConfig",
    "PrepareConfig",
    "PromoteConfig",
    "PromptsConfig",
    "RisingThreshold",
    "SafetyConfig",
    "SampledConfig",
    "SamplerConfig",
    "SamplingConfig",
    "ScoringConfig",
    "Section",
    "SpoConfig",
    "TrainPreferenceConfig",
    "WatchConfig",
    "load_config",
]
