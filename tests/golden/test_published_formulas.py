"""The published code's formulas, rewritten in float64, on inputs that the golden set does not have."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spo.core.gaussian import log_prob
from spo.core.losses import dpo_loss, log_ratio, preference_loss
from spo.core.selection import select_pairs
from spo.core.step import gaussian_step
from spo.preference.preprocess import Preprocessing
from tests.schedules import grid, previous, stable_diffusion

PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES = list(itertools.product(PREDICTIONS, (10, 20, 50), (0.3, 1.0)))
SCHEDULE = stable_diffusion()
TABLE = SCHEDULE.alpha_bar


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def published_step(
    output: Tensor, x_t: Tensor, x_prev: Tensor, a_t: Tensor, a_prev: Tensor, *, eta: float, prediction_type: str
) -> dict[str, Tensor]:
    """Mean, std, x_0 and mean log-density by the formulas of the published `ddim_step_with_logprob`."""
    a_t, a_prev = a_t.view(-1, 1, 1, 1), a_prev.view(-1, 1, 1, 1)
    match prediction_type:
        case "epsilon":
            x_0, eps = (x_t - (1 - a_t) ** 0.5 * output) / a_t**0.5, output
        case "sample":
            x_0, eps = output, (x_t - a_t**0.5 * output) / (1 - a_t) ** 0.5
        case _:
            x_0 = a_t**0.5 * x_t - (1 - a_t) ** 0.5 * output
            eps = a_t**0.5 * output + (1 - a_t) ** 0.5 * x_t
    std = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    mean = a_prev**0.5 * x_0 + (1 - a_prev - std**2) ** 0.5 * eps
    density = -((x_prev - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return {"x_0": x_0, "std": std.flatten(), "mean": mean, "log_prob": density.mean(dim=(1, 2, 3))}


@pytest.mark.parametrize(("prediction_type", "steps", "eta"), CASES)
def test_every_step_of_a_grid_is_the_published_one(prediction_type: str, steps: int, eta: float):
    """The last steps included: to 1e-6 in the published float32, and as near to float64 as float32 can be."""
    t = grid(steps)
    t_prev = previous(t, steps=steps)
    output, x_t = draw(len(t), 4, 8, 8, seed=steps), draw(len(t), 4, 8, 8, seed=steps + 1)
    ours = gaussian_step(output, x_t, t, t_prev, schedule=SCHEDULE, eta=eta, prediction_type=prediction_type)
    x_prev = ours.mean + ours.std * draw(*x_t.shape, seed=steps + 2)
    inputs = (output, x_t, x_prev, TABLE[t], TABLE[t_prev])
    found = {"x_0": ours.x_0, "std": ours.std.flatten(), "mean": ours.mean, "log_prob": log_prob(ours, x_prev)}
    same = published_step(*inputs, eta=eta, prediction_type=prediction_type)
    exact = published_step(*(each.double() for each in inputs), eta=eta, prediction_type=prediction_type)
    for name, value in found.items():
        torch.testing.assert_close(value, same[name], rtol=1e-6, atol=1e-6)
        early, late = value[:-1].double(), value[-1].double()
        torch.testing.assert_close(early, exact[name][:-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(late, exact[name][-1], rtol=3e-4, atol=3e-4)  # 1 - alpha_bar_1 / alpha_bar_0 cancels
    assert torch.isfinite(found["log_prob"]).all()


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_without_noise_the_mean_is_the_published_ddim_step(prediction_type: str):
    t = grid(20)
    t_prev = previous(t, steps=20)
    output, x_t = draw(20, 4, 8, 8), draw(20, 4, 8, 8, seed=1)
    ours = gaussian_step(output, x_t, t, t_prev, schedule=SCHEDULE, eta=0.0, prediction_type=prediction_type)
    inputs = (each.double() for each in (output, x_t, x_t, TABLE[t], TABLE[t_prev]))
    exact = published_step(*inputs, eta=0.0, prediction_type=prediction_type)
    torch.testing.assert_close(ours.mean.double(), exact["mean"], rtol=1e-5, atol=1e-5)
    assert not ours.std.any()


@pytest.mark.parametrize("clip_range", [None, 0.1])
@pytest.mark.parametrize("scale", [1e-4, 0.1, 5.0])
def test_the_loss_and_its_gradient_are_the_published_ones(clip_range: float | None, scale: float):
    """-log sigmoid(beta (log clamp(exp d_win) - log clamp(exp d_lose))), which overflows nowhere here in float64."""
    log_p, log_p_ref = scale * draw(64, 2), scale * draw(64, 2, seed=1)
    ours, theirs = log_p.clone().requires_grad_(), log_p.double().requires_grad_()
    loss = dpo_loss(log_ratio(ours, log_p_ref, clip_range=clip_range), beta=10.0).value
    ratio = (theirs - log_p_ref.double()).exp()
    if clip_range is not None:
        ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    expected = -F.logsigmoid(10.0 * (ratio[:, 0].log() - ratio[:, 1].log())).mean()
    (found,) = torch.autograd.grad(loss, ours)
    (wanted,) = torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_preference_criterion_is_the_published_one_with_ties_and_repeated_prompts(seed: int):
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(40, 2, generator=generator)
    share = torch.randint(3, (40,), generator=generator) / 2  # 0, a tie, 1
    label = torch.stack([share, 1 - share], dim=1)
    examples = torch.randint(1, 6, (40,), generator=generator).float()
    exact = scores.double()
    entropy = label.double().mul(exact.log_softmax(dim=1)).sum(dim=1).neg()
    entropy = entropy + (label[:, 0] == label[:, 1]).double() * math.log(0.5)
    weight = (1 / examples.double()) / (1 / examples.double()).sum()
    assert (share == 0.5).any()
    loss = preference_loss(scores, label, 1 / examples).value
    torch.testing.assert_close(loss.double(), (weight * entropy).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("k", "threshold"), [(2, 0.4), (4, 0.3), (8, 0.0)])
def test_selection_is_the_published_one(k: int, threshold: float):
    scores = 2 * draw(k, 500, seed=k)
    ordered, index = scores.double().sort(dim=0, descending=True)
    share = ordered[[0, -1]].softmax(dim=0)
    selection = select_pairs(scores, threshold=threshold)
    assert torch.equal(torch.stack([selection.win, selection.lose]), index[[0, -1]])
    assert torch.equal(selection.keep, share[0] - share[1] > threshold)


@pytest.mark.parametrize("shape", [(40, 40), (36, 52), (52, 36), (61, 33), (28, 28), (28, 45), (20, 31), (512, 768)])
def test_preprocessing_is_the_published_one_for_every_shape(shape: tuple[int, int]):
    """On pictures in [-1, 1] and beyond: resize, crop the longer side, to [0, 1], clamp, normalise."""
    pictures = F.interpolate(1.5 * draw(2, 3, 9, 9), shape, mode="bilinear")
    preprocess = Preprocessing(size=28, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), mode="published")
    height, width = (int(side * (28 / min(shape)) + 0.5) for side in shape)
    exact = F.interpolate(pictures.double(), (height, width), mode="bicubic", align_corners=False)
    top, left = round((height - 28) / 2), round((width - 28) / 2)
    exact = (exact[..., top : top + 28, left : left + 28] / 2 + 0.5).clamp(0, 1)
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    torch.testing.assert_close(preprocess(pictures / 2 + 0.5).double(), (exact - mean) / std, rtol=1e-4, atol=1e-4)
