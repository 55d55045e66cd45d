"""The settings of every stage: `params.yaml` names a profile, and `configs/<profile>.yaml` holds its settings.

Each section belongs to one stage or component. Unknown keys are errors, and settings do not change after loading. A
default cites the paper (arXiv 2406.04314) or the published configuration that it comes from.
"""

from spo.config.align import (
    AlignConfig,
    D3poConfig,
    DiffusionDpoConfig,
    GroupConfig,
    GrpoConfig,
    LateConfig,
    LoraConfig,
    MethodConfig,
    OptimizerConfig,
    PairConfig,
    RisingThreshold,
    SampledConfig,
    ScoringConfig,
    SpoConfig,
    StepGrpoConfig,
    WatchConfig,
)
from spo.config.evaluate import EvaluateConfig, LoraSource, NetworkSource, SamplerConfig
from spo.config.metrics import (
    AestheticConfig,
    ClipMetricConfig,
    HpsConfig,
    ImageRewardConfig,
    MetricConfig,
    OracleConfig,
)
from spo.config.model import FLOW, ModelConfig, SamplingConfig, sides
from spo.config.preference import (
    CandidatesConfig,
    CustomPreferenceConfig,
    LabelsConfig,
    LatentPreferenceConfig,
    PairFilter,
    PixelPreferenceConfig,
    PreferenceConfig,
    PrepareConfig,
    TrainPreferenceConfig,
)
from spo.config.profile import Config, LaunchConfig, SafetyConfig, load_config
