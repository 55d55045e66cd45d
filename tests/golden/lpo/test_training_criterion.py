"""The published training loss of the latent preference model and its gradients."""

import pytest
import torch
from torch import Tensor

from spo.core.losses import preference_loss
from spo.preference.latent import LatentPreferenceModel
from tests.golden.lpo.conftest import assert_near, read
from tests.schedules import stable_diffusion

Figures = dict[str, Tensor]
CRITERIA = {"criterion": "lrm_sd15", "criterion_xl": "lrm_sdxl"}
MID_TO_V = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
GRADIENTS = {  # the published name and the model's
    "criterion": {
        "visual_projection": "visual_projection.weight",
        "logit_scale": "logit_scale",
        "unet_conv_in": "unet.conv_in.weight",
        "text_projection": "text_projection.weight",
        "mid_to_v": MID_TO_V,
        "token_embedding": "text_encoders.0.embeddings.token_embedding.weight",
    },
    "criterion_xl": {
        "visual_projection": "visual_projection.weight",
        "logit_scale": "logit_scale",
        "unet_conv_in": "unet.conv_in.weight",
        "add_embedding": "unet.add_embedding.linear_1.weight",
        "text_projection_2": "text_encoders.1.text_projection.weight",
    },
}


def scored(
    model: LatentPreferenceModel, figures: Figures, criterion: str, null: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Scores (n, 2) and the noisy latents (2 n, ...), all first images first, with noise of each image's own."""
    given = {
        key.removeprefix(f"{criterion}."): each for key, each in figures.items() if key.startswith(f"{criterion}.")
    }
    names = ("input_ids", "input_ids_2")[: model.num_text_encoders]
    text = model.encode([given[name] for name in names], [null[name] for name in names]).repeat(2)
    level = stable_diffusion().level(given["noisy_timesteps"])
    noisy = level.signal * given["latents"] + level.noise * given["noise"]
    return model.score(noisy, given["noisy_timesteps"], text).unflatten(0, (2, -1)).T, noisy


@pytest.mark.parametrize("criterion", CRITERIA)
def test_loss_scores_and_gradients_are_the_published_ones(figures: Figures, criterion: str):
    model = read(CRITERIA[criterion]).model
    family = "lrmxl" if criterion == "criterion_xl" else "lrm15"
    null = {name: figures.get(f"{family}.null_{name}") for name in ("input_ids", "input_ids_2")}
    scores, noisy = scored(model, figures, criterion, null)
    label = torch.stack([figures[f"{criterion}.label_0"], figures[f"{criterion}.label_1"]], dim=1)
    loss = preference_loss(scores, label, 1 / figures[f"{criterion}.examples_per_prompt"])
    loss.value.backward()

    assert_near(noisy, figures[f"{criterion}.noisy"])
    assert_near(scores.T, figures[f"{criterion}.scores"])
    assert_near(loss.value.reshape(1), figures[f"{criterion}.loss"])
    parameters = dict(model.named_parameters())
    for published, name in GRADIENTS[criterion].items():
        gradient = parameters[name].grad.reshape(figures[f"{criterion}.grad_{published}"].shape)
        assert_near(gradient, figures[f"{criterion}.grad_{published}"], 1e-3)


def test_every_weight_of_the_model_trains(figures: Figures):
    model = read("lrm_sd15").model
    null = {"input_ids": figures["lrm15.null_input_ids"]}
    scores, _ = scored(model, figures, "criterion", null)
    scores.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_published_scores_are_cosines_of_the_published_features(figures: Figures, criterion: str):
    """So that the scores above can be compared with theirs, whose features are normalised."""
    text, scale = figures[f"{criterion}.text"], figures[f"{criterion}.logit_scale"].exp()
    expected = torch.stack([scale * (figures[f"{criterion}.image_{i}"] * text).sum(dim=1) for i in (0, 1)])
    assert_near(expected, figures[f"{criterion}.scores"])
