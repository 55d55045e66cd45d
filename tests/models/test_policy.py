"""Checkpoints of a LoRA and of full fine-tuning come back as they were; merged pipelines are the policy."""

import pytest
import torch

from spo.errors import ModelError
from spo.models.policy import export, load_policy, save_merged, save_policy
from tests.models.sampled import SAMPLING, close, ours, theirs
from tests.models.tiny import load_plainly, make_tiny_denoiser


@pytest.fixture
def whole(make):
    """A denoiser all of whose network was trained."""
    denoiser = make()
    denoiser.network.unfreeze()
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.mul_(1.1)
    return denoiser


def test_checkpoints_of_either_kind_come_back_in_any_order_over_one_base(policy, whole, make, tmp_path):
    save_policy(policy.network, tmp_path / "lora")
    save_policy(whole.network, tmp_path / "whole")
    other = make()
    base = theirs(other.network.pipeline)
    for name, trained in (("whole", whole), ("lora", policy), ("whole", whole), ("whole", whole), ("lora", policy)):
        load_policy(other.network, tmp_path / name)
        torch.testing.assert_close(ours(other), ours(trained), rtol=1e-4, atol=1e-4)  # order in memory may differ
        assert (theirs(other.network.pipeline) - base).abs().max() > 0.05
        with other.reference():
            assert torch.equal(theirs(other.network.pipeline), base)
    assert other.network.parameters()


def test_full_fine_tuning_is_saved_as_diffusers_loads_a_network(whole, plain_pipeline, tmp_path):
    save_policy(whole.network, tmp_path / "whole")
    name = whole.network.component
    setattr(plain_pipeline, name, type(whole.network.module).from_pretrained(tmp_path / "whole" / name))
    close(theirs(plain_pipeline), ours(whole))


def test_full_fine_tuning_of_a_half_precision_base_comes_back_in_its_dtype(make, tmp_path):
    policy, other = make(dtype="bfloat16"), make(dtype="bfloat16")
    policy.network.unfreeze()
    save_policy(policy.network, tmp_path / "whole")
    load_policy(other.network, tmp_path / "whole")
    assert {weight.dtype for weight in other.network.module.parameters()} == {torch.bfloat16}
    assert theirs(other.network.pipeline).isfinite().all()


def test_a_damaged_or_foreign_unet_is_refused_in_one_line(tiny_folder, tmp_path):
    small, large = (make_tiny_denoiser(family, tiny_folder(family)) for family in ("sd15", "sdxl"))
    small.network.unfreeze()
    save_policy(small.network, tmp_path / "whole")
    with pytest.raises(ModelError, match="another base model"):
        load_policy(large.network, tmp_path / "whole")
    weights = tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_policy(small.network, tmp_path / "whole")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "merged"])
def test_every_export_gives_plain_diffusers_the_policys_images(policy, plain_pipeline, tmp_path, format):
    out = tmp_path / {"diffusers": "lora", "kohya": "lora.safetensors", "merged": "merged"}[format]
    export(policy.network, format, out)
    if format == "merged":
        plain_pipeline = load_plainly(out)
    else:
        plain_pipeline.load_lora_weights(str(out))
    close(theirs(plain_pipeline), ours(policy))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_full_fine_tuning_has_no_lora_to_export(whole, tmp_path):
    for format in ("diffusers", "kohya"):
        with pytest.raises(ModelError, match="use --format merged"):
            export(whole.network, format, tmp_path / "out")
    export(whole.network, "merged", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merged_pipeline_is_the_policy_without_an_adapter(policy, family, tmp_path):
    before = [p.clone() for p in policy.network.module.parameters()]
    save_merged(policy.network, tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.network.module.parameters(), strict=True))
    merged = make_tiny_denoiser(family, tmp_path / "merged", sampling=SAMPLING)
    assert not any("lora" in name for name, _ in merged.network.module.named_parameters())
    assert getattr(policy.network.pipeline, policy.network.component) is policy.network.module
    close(ours(merged), ours(policy))


def test_merged_pipeline_of_full_fine_tuning_is_the_policy(make, family, tmp_path):
    policy = make()
    policy.network.unfreeze()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.mul_(1.1)
    save_merged(policy.network, tmp_path / "merged")
    close(ours(make_tiny_denoiser(family, tmp_path / "merged", sampling=SAMPLING)), ours(policy))
