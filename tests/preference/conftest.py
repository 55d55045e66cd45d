"""Tiny random CLIPs made in memory, as a plain repository and as a preference model with a life of its own."""

import string
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from spo.preference.checkpoint import PreferenceModel
from spo.preference.pixel import StepAwareCLIP
from spo.preference.preprocess import Preprocessing

SIZE = 24


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    ends = [f"{character}</w>" for character in letters + string.digits]
    words = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


@pytest.fixture(scope="session")
def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 12,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
        projection_dim=8,
    )


@pytest.fixture
def clip(config: CLIPConfig) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(config).eval()


@pytest.fixture
def step_aware(clip: CLIPModel) -> StepAwareCLIP:
    """A model whose modulations depend on t, as after training."""
    model = StepAwareCLIP.from_clip(clip)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("clip."):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def preference(step_aware: StepAwareCLIP, tokenizer: CLIPTokenizer) -> PreferenceModel:
    return PreferenceModel(step_aware, tokenizer, Preprocessing(size=SIZE))


@pytest.fixture
def clip_folder(clip: CLIPModel, tokenizer: CLIPTokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "clip"
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def timesteps() -> torch.Tensor:
    return torch.tensor([0, 981, 401, 981, 1])
