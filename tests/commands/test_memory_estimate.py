"""Memory before anything is loaded: what was measured, what is counted, and the settings that make it fit."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from spo.commands import memory_estimate, preflight
from spo.commands.architectures import network_of, part_of, preference_weights, weights
from spo.commands.memory_estimate import MemoryEstimate, base_bytes, estimate, jobs
from spo.commands.memory_remedy import remedy, with_setting
from spo.config import Config, load_config
from spo.pipeline import PIPELINE

ROOT = Path(__file__).parents[2]
FULL_SIZE = ("sd15", "sdxl", "sd35", "flux")
GIB = 2**30


def profile(name: str, **changes: object) -> Config:
    """A profile with other values; a key has __ for a dot."""
    config = load_config(ROOT, name)
    for key, value in changes.items():
        config = with_setting(config, key.replace("__", "."), value)
    return config


@pytest.mark.parametrize(
    ("job", "changes", "gigabytes"),
    [
        ("train_preference pixel", {"preference_models__pixel__batch_size": 16}, 42.6),
        ("align spo", {"align__spo__prompts_per_rollout": 10}, 25.7),
        (
            "align spo",
            {"align__spo__preference_model": "latent"},
            27.6 - 5.2,
        ),  # the measured one had the CLIP beside it
    ],
)
def test_estimates_for_sd15_are_what_was_measured_on_an_h100(
    job: str, changes: dict[str, object], gigabytes: float
) -> None:
    config = profile(
        "sd15", **{"align__spo__watch": None, "preference_models__pixel__micro_batch_size": None, **changes}
    )
    assert estimate(config, job).total / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_the_estimate_for_sd35_is_what_was_measured_on_an_h100() -> None:
    config = profile("sd35", align__spo__watch=None, align__spo__prompts_per_rollout=4)
    config = with_setting(with_setting(config, "model.t5", False), "model.offload_text_encoders", False)
    assert estimate(config, "align spo").total / 1e9 == pytest.approx(16.3, rel=0.05)


def test_the_estimate_for_flux_is_what_was_measured_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured one had a T5 of one layer: with the whole one, encoding the prompts is the peak."""
    config = profile("flux", align__spo__watch=None, align__spo__prompts_per_rollout=2, align__spo__batch_size=2)
    resting, _ = base_bytes(config)
    monkeypatch.setattr(memory_estimate, "base_bytes", lambda config: (resting, 10**9))
    assert estimate(config, "align spo").total / 1e9 == pytest.approx(34.5, rel=0.05)


def test_the_default_batch_of_64_pairs_takes_what_a_trial_at_full_size_found() -> None:
    config = profile("sd15", preference_models__pixel__micro_batch_size=None, model__gradient_checkpointing=False)
    assert estimate(config, "train_preference pixel").total / GIB == pytest.approx(101, rel=0.02)


def test_what_trains_is_counted_with_gradients_moments_and_copies() -> None:
    pixel = profile("sd15")
    count = preference_weights(pixel.model, pixel.preference_models["pixel"])

    def counted(job: str, **changes: object) -> float:
        return estimate(profile("sd15", **changes), job).counted

    training = counted("train_preference pixel")
    assert training - counted("train_preference pixel", preference_models__pixel__eight_bit=True) == 6 * count
    assert training - counted("train_preference pixel", preference_models__pixel__dtype="float32") == 2 * count
    assert training - counted("train_preference pixel", preference_models__pixel__checkpoint="owner/name") == 14 * count
    unet = weights(network_of(pixel.model))
    whole = counted("align spo", align__spo__full_fine_tuning=True)
    assert whole - counted("align spo", align__spo__full_fine_tuning=True, align__spo__optimizer__eight_bit=True) == (
        6 * unet
    )
    assert whole > 18 * unet


def test_fewer_pairs_at_a_time_and_checkpointing_change_the_estimated_part_alone() -> None:
    plain, fewer, checkpointed = (
        estimate(profile("sd15", **changes), "align spo")
        for changes in ({}, {"align__spo__micro_batch_size": 5}, {"model__gradient_checkpointing": True})
    )
    assert plain.counted == fewer.counted == checkpointed.counted
    assert fewer.activations == pytest.approx(plain.activations / 2)
    assert checkpointed.activations < plain.activations / 3


def test_sdxls_own_vae_is_counted_in_float32_beside_a_float16_model() -> None:
    """The pipeline and `Autoencoder` run it in float32; the fixed one of the profile runs in half precision."""
    fixed, own = (
        estimate(profile("sdxl", model__dtype="float16", model__vae=vae), "evaluate")
        for vae in ("madebyollin/sdxl-vae-fp16-fix", None)
    )
    vae = weights(part_of(profile("sdxl").model, "vae"))
    assert own.counted - fixed.counted == 4 * vae
    assert own.activations == 2 * fixed.activations


def test_several_processes_share_the_pairs_of_a_batch() -> None:
    config = profile("sd15", preference_models__pixel__micro_batch_size=None)
    alone, four = (
        estimate(each, "train_preference pixel") for each in (config, profile("sd15", launch__num_processes=4))
    )
    assert four.counted == alone.counted
    assert four.activations < alone.activations / 3


def test_of_a_sharded_network_a_process_has_its_part_and_what_is_gathered_at_a_time() -> None:
    common = {"align__spo__full_fine_tuning": True, "align__spo__watch": None, "launch__num_processes": 4}
    common |= {"model__gradient_checkpointing": True}
    unet = weights(network_of(profile("sdxl").model))
    whole, part = (
        estimate(profile("sdxl", launch__shard_network=sharded, **common), "align spo") for sharded in (False, True)
    )
    divided = unet * (2 + 4 + 4 + 8 + 2)  # the frozen copy, weights, gradients, moments, autocast's copies
    gathered = part.counted - (whole.counted - 0.75 * divided)
    assert 0 < gathered < 0.2 * 4 * unet
    without = estimate(
        profile("sdxl", launch__shard_network=True, **{**common, "model__gradient_checkpointing": False}), "align spo"
    )
    assert without.counted - part.counted == pytest.approx(0.75 * 2 * unet)


def test_a_sharded_network_is_whole_in_each_process_at_the_start() -> None:
    changes = {"align__spo__full_fine_tuning": True, "launch__shard_network": True, "launch__num_processes": 64}
    config = profile("flux", **changes)
    assert estimate(config, "align spo").total > 6 * weights(network_of(config.model))


def test_several_processes_are_advised_to_shard_the_network_and_never_with_8_bit_moments() -> None:
    changes = {"align__spo__full_fine_tuning": True, "align__spo__watch": None, "launch__num_processes": 4}
    config = profile("sdxl", **changes)
    assert "launch.shard_network: true" in (remedy(config, "align spo", 40 * GIB) or "")
    sharded = profile("sdxl", launch__shard_network=True, **changes)
    assert "eight_bit" not in (remedy(sharded, "align spo", 24 * GIB) or "")


def test_a_sharded_network_is_not_advised_where_a_method_of_the_run_has_8_bit_moments() -> None:
    changes = {"align__spo__full_fine_tuning": True, "align__spo__watch": None, "launch__num_processes": 4}
    config = with_setting(profile("sdxl", **changes), "align.lpo.optimizer.eight_bit", True)
    found = [
        remedy(config.model_copy(update={"methods": each}), "align spo", 40 * GIB)
        for each in (("spo",), ("spo", "lpo"))
    ]
    assert ["shard_network" in (each or "") for each in found] == [True, False]


def test_one_process_holds_all_of_a_network_that_is_to_be_sharded() -> None:
    one, plain = (profile("sdxl", launch__shard_network=sharded) for sharded in (True, False))
    assert estimate(one, "align spo") == estimate(plain, "align spo")


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("gib", [24, 40, 80])
def test_the_proposed_settings_make_a_job_fit(name: str, gib: int) -> None:
    config = load_config(ROOT, name)
    for job in jobs(config):
        for proposal in (remedy(config, job, gib * GIB) or "").split("; or "):
            if not proposal or "instead" in proposal:
                continue
            changed = config
            for setting in proposal.split(", "):
                key, _, value = setting.partition(": ")
                changed = with_setting(changed, key, YAML(typ="safe").load(value))
            assert estimate(changed, job).fits(gib * GIB)


def test_the_order_of_proposals_is_pairs_at_a_time_checkpointing_a_latent_model_and_eight_bit() -> None:
    config = profile("sd15", preference_models__pixel__micro_batch_size=None, model__gradient_checkpointing=False)
    job = "train_preference pixel"
    assert estimate(config, job).fits(120 * GIB)
    assert remedy(config, job, 80 * GIB) == "preference_models.pixel.micro_batch_size: 32"
    with_eight_bit = remedy(config, job, 24 * GIB)
    assert with_eight_bit is not None
    latent, eight = with_eight_bit.split("; or ")
    assert latent.startswith("train latent instead with ")
    assert "preference_models.pixel.eight_bit: true" in eight and "model.gradient_checkpointing: true" in eight
    assert remedy(config, job, 4 * GIB) is None


def test_the_watch_of_a_training_can_be_what_needs_the_memory() -> None:
    found = remedy(profile("sdxl"), "align spo", 24 * GIB)
    assert found == "evaluate.batch_size: 1"


def with_gpu(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = namedtuple("properties", "total_memory")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties(int(memory)))


def test_without_a_gpu_the_memory_is_told_and_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(preflight._memory(load_config(ROOT, "sd15"), PIPELINE))
    assert [finding.what for finding in found] == [f"memory for {job}" for job in jobs(load_config(ROOT, "sd15"))]
    assert all(finding.good and not finding.doubtful and " on a GPU, of which " in finding.detail for finding in found)


@pytest.mark.parametrize(("gib", "good"), [(20, False), (30, True)])
def test_a_gpu_that_is_too_small_gets_settings_and_ends_the_check_only_for_what_is_counted(
    gib: int, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, gib * GIB)
    found = {finding.what: finding for finding in preflight._memory(load_config(ROOT, "sd15"), PIPELINE)}
    pixel = found["memory for train_preference pixel"]
    assert (pixel.good, pixel.doubtful, pixel.stages) == (good, True, ("train_preference",))
    assert f"; the GPU has {gib}.0 GiB, too little: " in pixel.detail
    assert "\n" not in pixel.detail


def test_only_a_part_of_a_gpus_memory_is_for_tensors() -> None:
    assert MemoryEstimate(counted=50, activations=44).fits(100)
    assert not MemoryEstimate(counted=50, activations=45).fits(100)


def test_a_setting_is_changed_anywhere_in_a_profile() -> None:
    config: Any = profile("sd15", align__spo__optimizer__eight_bit=True, model__dtype="float32")
    assert config.align["spo"].optimizer.eight_bit
    assert config.model.dtype == "float32"
    assert not config.align["lpo"].optimizer.eight_bit
