import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from spo.config import FLOW, Config, EvaluateConfig, load_config
from spo.errors import ConfigError
from spo.workspace import Workspace

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))

Change = Callable[[dict[str, Any]], Any]


def project(
    folder: Path, change: Change = lambda values: None, params: str = "profile: mine\nmethods: [spo]\n"
) -> Path:
    values = copy.deepcopy(TINY)
    change(values)
    (folder / "configs").mkdir()
    (folder / "configs" / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    return folder


def pixel(values: dict[str, Any]) -> dict[str, Any]:
    return values["preference_models"]["pixel"]


@pytest.mark.parametrize("profile", PROFILES)
def test_each_shipped_profile_is_valid(profile: str) -> None:
    config = load_config(ROOT, profile)
    assert config.profile == profile
    assert set(config.methods) <= set(config.align)
    assert Workspace(config).aligned("spo", 3) == Path("runs") / profile / "align" / "spo" / "seed-3"


@pytest.mark.parametrize("profile", ["sd15", "sdxl"])
def test_lpo_has_the_latent_model_with_its_own_settings_and_no_other(profile: str) -> None:
    config = load_config(ROOT, profile)
    latent = config.preference_models[config.scorer_of("lpo")]
    assert latent.kind == "latent" and latent.filter is not None
    assert latent.model_fields_set >= {"steps", "warmup_steps", "batch_size", "learning_rate"}
    assert config.labels_of("latent").kind == "human"
    values = config.model_dump()
    values["align"]["lpo"]["preference_model"] = "pixel"
    with pytest.raises(ValidationError, match=r"align\.lpo\.scoring\.at_step_time=true needs a preference model"):
        Config.model_validate(values)


def test_params_yaml_names_a_shipped_profile() -> None:
    assert load_config(ROOT).profile in PROFILES


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = load_config(project(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["align"]["spo"].update(bata=5), r"align\.spo\.bata: unknown key"),
        (lambda v: v.update(sed=5), r"sed: unknown key"),
        (lambda v: v["align"].update({"spo.b5": v["align"]["spo"]}), r"align\.spo\.b5.*pattern .*, got 'spo\.b5'"),
        (lambda v: v["preference_models"].update({"a.b": pixel(v)}), r"preference_models\.a\.b.*pattern"),
        (lambda v: v["sampling"].update(guidance_scale=float("nan")), r"guidance_scale: .*finite number, got nan"),
        (lambda v: v["align"]["spo"].update(beta=float("inf")), r"align\.spo\.beta: .*finite number, got inf"),
        (lambda v: v["align"]["spo"].update(beta=-1), r"align\.spo\.beta: .*greater than 0, got -1"),
        (lambda v: v["model"].pop("path"), r"model\.path: Field required"),
        (lambda v: v["model"].update(family="sd4"), r"model\.family: .*'sd15', 'sdxl', 'sd3' or 'flux', got 'sd4'"),
        (
            lambda v: v["align"]["spo"].update(branch_steps=3),
            r"branch_steps=3 must divide .* = 8; use one of \[1, 2, 4, 8\]",
        ),
        (lambda v: v["align"]["spo"].update(first_step=10), r"first_step=10 must be below sampling\.steps=10"),
        (
            lambda v: v["evaluate"].update(primary="beauty"),
            r"evaluate: primary and guarded must be scores .*got 'beauty'",
        ),
        (
            lambda v: v["evaluate"].update(loras={"spo": "a/b"}),
            r"evaluate\.loras and networks: \['spo'\] are names of other",
        ),
        (lambda v: v["evaluate"].update(loras={"a/b": "a/b"}), r"evaluate\.loras\.a/b.*: String should match pattern"),
        (lambda v: v["evaluate"].update(loras={"a": {"file": "b"}}), r"evaluate\.loras\.a\.source: Field required"),
        (
            lambda v: v["prepare"].pop("preferences"),
            r"prepare\.preferences is missing: .*preference_models\.pixel\.checkpoint",
        ),
        (lambda v: v["evaluate"].update(samplers={}), r"evaluate\.samplers: .*at least 1 item"),
        (lambda v: v["evaluate"]["samplers"].update({"a b": {}}), r"evaluate\.samplers\.a b.*: String should match"),
        (lambda v: v["evaluate"]["samplers"]["ddim"].update(eta=2), r"evaluate\.samplers\.ddim\.eta: .* got 2"),
        (lambda v: v["evaluate"].update(etas=[0]), r"evaluate\.etas: unknown key"),
        (lambda v: v["evaluate"].update(metrics=[]), r"evaluate\.metrics: .*at least 1 item"),
        (lambda v: v.update(labels={"kind": "pseudo"}), r"pseudo needs labels\.model"),
        (
            lambda v: v["align"]["spo"].update(watch={"every": 2, "metric": {"kind": "oracle"}, "score": "beauty"}),
            r"align\.spo\.watch: watch\.score must be one of .*'beauty'",
        ),
        (lambda v: pixel(v).update(kind="audio"), r"preference_models\.pixel: .*whose kind is pixel, latent or custom"),
        (
            lambda v: v["preference_models"].update(pixel=3),
            r"preference_models\.pixel: .*whose kind is pixel, latent or custom, got 3",
        ),
        (lambda v: pixel(v).update(kind="latent"), r"preference_models\.pixel\.start_from: unknown key"),
        (lambda v: pixel(v).update(steps=0), r"preference_models\.pixel\.steps: .*got 0"),
        (lambda v: pixel(v).update(noise_per="pair"), r"preference_models\.pixel\.noise_per: unknown key"),
        (
            lambda v: v["preference_models"].update(pixel={"kind": "latent", "checkpoint_base": "a/b"}),
            r"preference_models\.pixel: checkpoint_base needs a checkpoint",
        ),
        (lambda v: v.update(train_preference={"kind": "latent"}), r"is now one of several: preference_models: \{NAME"),
        (
            lambda v: v["align"]["spo"].update(preference_model="latent", look_ahead=0),
            r"align\.spo needs the preference model 'latent', which train_preference .* got \['pixel'\], so add it",
        ),
        (
            lambda v: v["align"]["spo"].update(preference_model="other"),
            r"align\.spo\.preference_model='other' is none of \['latent', 'pixel'\]",
        ),
        (
            lambda v: pixel(v).update(candidates={"metric": {"kind": "oracle"}, "score": "beauty"}),
            r"preference_models\.pixel\.candidates: score must be one of .*'beauty'",
        ),
        (
            lambda v: pixel(v).update(filter={"metrics": [{"kind": "oracle"}], "gaps": {"beauty": 0}}),
            r"preference_models\.pixel\.filter: gaps and ties name \['beauty'\], but the metrics measure",
        ),
        (lambda v: v["align"]["spo"].update(threshold=2), r"align\.spo\.threshold: .*equal to 1, got 2"),
        (
            lambda v: v["align"]["spo"].update(threshold={"low": 0.5, "high": 0.4}),
            r"align\.spo\.threshold: low=0\.5 must not be above high=0\.4",
        ),
        (lambda v: v["align"]["spo"].update(threshold={"low": 0.5}), r"align\.spo\.threshold\.high: Field required"),
        (
            lambda v: (
                v["sampling"].update(eta=0.0),
                v["align"]["spo"].update(threshold={"low": 0.1, "high": 0.4}),
            ),
            r"align\.spo\.threshold rises with the steps' std",
        ),
        (
            lambda v: v["align"]["spo"].update(late={"preference_model": "none", "at_most": 250}),
            r"align\.spo\.late\.preference_model='none' is none of \['latent', 'pixel'\]",
        ),
        (
            lambda v: v["align"]["spo"].update(look_ahead=0, late={"preference_model": "latent", "at_most": 250}),
            r"align\.spo needs the preference model 'latent', which train_preference .* got \['pixel'\], so add it",
        ),
        (
            lambda v: v["align"]["spo"].update(late={"preference_model": "pixel", "at_most": 1000}),
            r"align\.spo\.late\.at_most: Input should be less than 1000",
        ),
        (
            lambda v: v["align"]["lpo"].update(look_ahead=1),
            r"align\.lpo\.look_ahead=1 needs a preference model that scores the predicted x_0; 'latent' scores noisy",
        ),
        (
            lambda v: v["align"]["spo"].update(scoring={"at_step_time": True}),
            r"align\.spo\.scoring\.at_step_time=true needs a preference model of kind latent",
        ),
        (
            lambda v: v.update(launch={"shard_network": True}, model={**v["model"], "compile": True}),
            r"model\.compile=true is not possible with launch\.shard_network=true; set one of them false",
        ),
        (
            lambda v: (
                v.update(launch={"shard_network": True}),
                v["align"]["spo"].update(optimizer={"eight_bit": True}),
            ),
            r"align\.spo\.optimizer\.eight_bit=true is not possible with launch\.shard_network=true; set one",
        ),
        (lambda v: v["align"]["spo"].update(method="sp0"), r"align\.spo: .*'sp0'"),
        (lambda v: v["sampling"].update(noise="cps"), r"sampling\.noise=cps is for sd3 and flux; use ddim for sd15"),
        (
            lambda v: v["evaluate"]["samplers"]["ddim"].update(scheduler=FLOW),
            r"evaluate\.samplers\.ddim: scheduler=FlowMatch\w+ is not for sd15; use one of a diffusion model",
        ),
        (
            lambda v: v["model"].update(family="sd3"),
            r"evaluate\.samplers\.ddim: scheduler=DDIMScheduler is not for sd3; use FlowMatchEulerDiscreteScheduler",
        ),
        (
            lambda v: (
                v["model"].update(family="sd3"),
                v["evaluate"].update(samplers={"flow": {"scheduler": FLOW}}),
                v["align"]["spo"].update(first_step=9),
            ),
            r"align\.spo\.first_step=9 must be below sampling\.steps - 1 = 9, since the last step of sd3 has no",
        ),
        (
            lambda v: v.update(align={"mine": v["align"]["spo"]}),
            r"methods names \['spo'\], but align has only \['mine'\]",
        ),
        (
            lambda v: v.update(align={"mine": v["align"]["spo"]}, launch={"shard_network": True}),
            r"methods names \['spo'\], but align has only \['mine'\]",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_place(tmp_path: Path, change: Change, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(project(tmp_path, change))
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_a_published_lora_is_named_plainly_or_with_its_file(tmp_path: Path) -> None:
    named = {"short": "owner/name", "long": {"source": "owner/name", "weight_name": "a.safetensors"}}
    loras = load_config(project(tmp_path, lambda v: v["evaluate"].update(loras=named))).evaluate.loras
    assert (loras["short"].source, loras["short"].weight_name) == ("owner/name", None)
    assert loras["long"].weight_name == "a.safetensors"


def test_an_unknown_profile_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'other' has no .*other\.yaml; there are \['mine'\]"):
        load_config(project(tmp_path), "other")


def test_a_profile_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile is None; name one of \['mine'\]"):
        load_config(project(tmp_path, params="methods: [spo]\n"))


def test_a_key_stands_in_one_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['seed'\] are in both"):
        load_config(project(tmp_path, params="profile: mine\nseed: 3\n"))


@pytest.mark.parametrize(
    ("params", "said"), [("a: [", "no valid YAML"), ("- a\n", "holds list"), ("", "holds NoneType")]
)
def test_a_file_that_is_no_mapping_is_told(tmp_path: Path, params: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(project(tmp_path, params=params))


def test_another_folder_is_told_to_be_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run from the project's folder"):
        load_config(tmp_path)


def test_the_first_sampler_of_a_profile_decides(tmp_path: Path) -> None:
    dpmpp = {"scheduler": "DPMSolverMultistepScheduler", "options": {"use_karras_sigmas": True}, "steps": 25}
    samplers = {"dpmpp": dpmpp, "ddim": {"eta": 0.0}}
    found = load_config(project(tmp_path, lambda v: v["evaluate"].update(samplers=samplers))).evaluate
    assert (list(found.samplers), found.deciding) == (["dpmpp", "ddim"], "dpmpp")
    assert found.samplers["dpmpp"].description == (
        "DPMSolverMultistepScheduler, 25 steps, guidance 5, use_karras_sigmas=True"
    )


@pytest.mark.parametrize("profile", ["sd15", "sdxl"])
def test_the_shipped_samplers_are_the_default(profile: str) -> None:
    assert load_config(ROOT, profile).evaluate.samplers == EvaluateConfig.model_fields["samplers"].get_default(
        call_default_factory=True
    )


def test_a_repeated_key_is_refused_as_dvc_refuses_it(tmp_path: Path) -> None:
    root = project(tmp_path)
    with (root / "configs" / "mine.yaml").open("a") as file:
        file.write("seed: 5\n")
    with pytest.raises(ConfigError, match=r"no valid YAML.*duplicate key") as caught:
        load_config(root)
    assert "\n" not in str(caught.value)
