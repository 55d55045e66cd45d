"""Metrics of real pictures: from files in the published formats to the scores that the published packages give."""

import shutil
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from spo.config import AestheticConfig, ClipMetricConfig, HpsConfig, ImageRewardConfig, OracleConfig, load_config
from spo.errors import ModelError
from spo.metrics.hpsv2 import HpsMetric
from spo.metrics.image_reward import ImageRewardMetric
from spo.metrics.metric import build_metrics, cut_prompts, score

PUBLISHED = Path(__file__).parent / "published"
CPU = torch.device("cpu")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP of the sizes of published/hps.pt, with random weights of its own and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {"!": 0, "<|startoftext|>": 62, "<|endoftext|>": 63}
    vocabulary |= {f"{letter}</w>": 1 + i for i, letter in enumerate(string.ascii_lowercase)}
    vocabulary |= {letter: 27 + i for i, letter in enumerate(string.ascii_lowercase)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    shared = {"num_hidden_layers": 1, "hidden_act": "gelu"}
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=1,
        max_position_embeddings=16,
        bos_token_id=62,
        eos_token_id=63,
        **shared,
    )
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=128, num_attention_heads=2, image_size=32, patch_size=8, **shared
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=48)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *string.ascii_lowercase])}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    """LAION's predictor in small, under the published names."""
    file = tmp_path_factory.mktemp("head") / "aesthetic-model.pth"
    layers = nn.Sequential(nn.Linear(48, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, file)
    return file


def test_hps_is_what_open_clip_computes(clip):
    golden = load_file(PUBLISHED / "hps.safetensors")
    metrics = build_metrics([HpsConfig(weights=str(PUBLISHED / "hps.pt"), clip=str(clip))], CPU)
    found = score(metrics, golden["images"], ["a b", "c", "d e f"])["hpsv2"]
    torch.testing.assert_close(found, 100 * golden["cosine"], rtol=1e-4, atol=1e-4)


def test_image_reward_is_what_the_published_package_computes(bert):
    golden = load_file(PUBLISHED / "image_reward.safetensors")
    config = ImageRewardConfig(weights=str(PUBLISHED / "image_reward.pt"), tokenizer=str(bert))
    found = score(build_metrics([config], CPU), golden["images"], ["a b c", "d", "e f g h i"])["image_reward"]
    torch.testing.assert_close(found, golden["image_reward"], rtol=1e-4, atol=1e-4)


def test_published_weights_take_the_place_of_weights_that_were_never_drawn(clip, bert, monkeypatch):
    drawn = []
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda layer: layer.weight.is_meta or drawn.append(layer))
    hps = HpsMetric(HpsConfig(weights=str(PUBLISHED / "hps.pt"), clip=str(clip)), CPU)
    assert not drawn
    config = ImageRewardConfig(weights=str(PUBLISHED / "image_reward.pt"), tokenizer=str(bert))
    reward = ImageRewardMetric(config, CPU)
    assert drawn == [layer for layer in reward.head if isinstance(layer, nn.Linear)]  # which is small
    for module in (hps.clip.model, reward.vision, reward.text):
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*module.parameters(), *module.buffers()))


def test_aesthetic_is_its_layers_on_the_image_alone(clip, head):
    images = torch.rand(3, 3, 40, 40)
    metrics = build_metrics([AestheticConfig(head=str(head), clip=str(clip))], CPU)
    found = score(metrics, images, ["a", "b", "c"])["laion_aesthetic"]
    state = torch.load(head, weights_only=True)
    x = metrics[0].clip.image_features(images)
    for i in (0, 2, 4):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(found, x[:, 0])
    assert torch.equal(found, score(metrics, images, ["d", "e", "f"])["laion_aesthetic"])


def test_a_clips_score_is_its_scaled_cosine_and_batches_do_not_matter(clip):
    images = torch.rand(70, 3, 32, 32)
    prompts = ["a b c"[: 1 + 2 * (i % 3)] for i in range(70)]
    metrics = build_metrics([ClipMetricConfig(name="mine", model=str(clip))], CPU)
    found = score(metrics, images, prompts)["mine"]
    model = CLIPModel.from_pretrained(clip).eval()
    seen = nn.functional.normalize(metrics[0].clip.image_features(images[69:]), dim=-1)
    read = nn.functional.normalize(metrics[0].clip.text_features(prompts[69:]), dim=-1)
    torch.testing.assert_close(found[69:], (model.logit_scale.exp() * (seen * read).sum(-1)).detach())
    assert found.shape == (70,)


def test_an_absent_metric_is_left_out_with_a_line_unless_its_score_decides(capsys):
    configs = [
        OracleConfig(),
        HpsConfig(weights="no/such/file.pt", clip="nosuch"),
        ImageRewardConfig(weights="none.pt"),
    ]
    assert len(build_metrics(configs, CPU, needed=("aesthetic",))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["hpsv2", "image_reward"]
    assert "none.pt is no file here" in lines[1]
    with pytest.raises(ModelError, match="no folder here"):
        build_metrics(configs, CPU, needed=("aesthetic", "hpsv2"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"layers.0.weight": torch.zeros(2, 48), "layers.0.bias": torch.zeros(2)}, "do not end in a score"),
        ({"layers.x.weight": torch.zeros(1, 48)}, "has no layers"),
        ({"steps": 3}, "holds no named tensors"),
        ({"blip.visual_encoder.x": torch.zeros(1)}, "has no layers"),
    ],
)
def test_a_wrong_file_is_named(clip, tmp_path, state, message):
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(ModelError, match=message) as caught:
        build_metrics([AestheticConfig(head=str(tmp_path / "head.pth"), clip=str(clip))], CPU)
    assert "\n" not in str(caught.value)


def test_weights_of_another_metric_or_with_code_in_them_are_refused(clip, bert, tmp_path):
    with pytest.raises(ModelError, match="an OpenCLIP checkpoint should hold"):
        build_metrics([HpsConfig(weights=str(PUBLISHED / "image_reward.pt"), clip=str(clip))], CPU)
    with pytest.raises(ModelError, match=r"holds nothing under blip\.visual_encoder"):
        build_metrics([ImageRewardConfig(weights=str(PUBLISHED / "hps.pt"), tokenizer=str(bert))], CPU)
    torch.save({"a": shutil.rmtree}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match="cannot be read as tensors only"):
        build_metrics([ImageRewardConfig(weights=str(tmp_path / "bad.pt"), tokenizer=str(bert))], CPU)


@pytest.mark.parametrize("profile", ["sd15", "sdxl"])
def test_the_profiles_for_real_pictures_have_the_papers_metrics(profile):
    config = load_config(Path(__file__).parents[2], profile).evaluate
    scores = [name for metric in config.metrics for name in metric.scores]
    assert scores == ["pickscore", "clipscore", "hpsv2", "image_reward", "laion_aesthetic"]


def test_a_score_that_is_not_finite_is_named() -> None:
    def broken(images, prompts):
        return {"beauty": torch.tensor([1.0, float("nan")])}

    with pytest.raises(ModelError, match="the score beauty of 'a dog' is nan; leave its metric out"):
        score([broken], torch.zeros(2, 3, 4, 4), ["a cat", "a dog"])


def test_prompts_that_a_metrics_text_encoder_cuts_are_named(clip: Path, bert: Path, head: Path) -> None:
    metrics = build_metrics(
        [
            ClipMetricConfig(name="pickscore", model=str(clip)),
            HpsConfig(weights=str(PUBLISHED / "hps.pt"), clip=str(clip)),
            ImageRewardConfig(weights=str(PUBLISHED / "image_reward.pt"), tokenizer=str(bert)),
            AestheticConfig(head=str(head), clip=str(clip)),
        ],
        CPU,
    )
    longest, longer = " ".join("a" * 14), " ".join("a" * 15)  # of 16 tokens, two are the start and the end
    assert cut_prompts(metrics, ["a cat", longest]) == {}
    assert cut_prompts(metrics, ["a cat", longer]) == {"pickscore": [longer], "hpsv2": [longer]}
    longest, longer = " ".join("a" * 33), " ".join("a" * 34)  # ImageReward's 35 tokens
    assert "image_reward" not in cut_prompts(metrics, [longest])
    assert cut_prompts(metrics, [longer])["image_reward"] == [longer]
