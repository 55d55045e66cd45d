import pytest
import torch
from torch.distributions import Normal

from spo.core.gaussian import log_prob, sample
from spo.core.types import Transition


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transition_of(*lead):
    mean = randn(*lead, 4, 3, 3)
    return Transition(mean, randn(*lead, 1, 1, 1, seed=1).abs() + 0.1, x_0=mean)


def test_log_prob_is_the_mean_of_torchs_normal():
    transition, x_prev = transition_of(5), randn(5, 4, 3, 3, seed=2)
    theirs = Normal(transition.mean, transition.std).log_prob(x_prev).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob(transition, x_prev), theirs)


def test_log_prob_of_a_sample_depends_on_its_noise_alone():
    transition, noise = transition_of(6), randn(3, 6, 4, 3, 3, seed=2)
    standard = Normal(0.0, 1.0).log_prob(noise).mean(dim=(2, 3, 4))  # (3, 6)
    for x_prev, expected in zip(sample(transition, noise), standard, strict=True):
        torch.testing.assert_close(log_prob(transition, x_prev) + transition.std.log().flatten(), expected)


@pytest.mark.parametrize("lead", [(5,), (5, 1)])
def test_pairs_that_share_x_t_share_its_gaussian(lead):
    transition, x_prev = transition_of(*lead), randn(5, 2, 4, 3, 3, seed=2)
    one = transition_of(5)
    each = torch.stack([log_prob(one, x_prev[:, 0]), log_prob(one, x_prev[:, 1])], dim=1)
    torch.testing.assert_close(log_prob(transition, x_prev), each)


@pytest.mark.parametrize("lead", [(10,), (5, 2)])
def test_pairs_that_do_not_share_x_t_have_a_gaussian_each(lead):
    transition, x_prev = transition_of(*lead), randn(5, 2, 4, 3, 3, seed=2)
    flat = log_prob(transition_of(10), x_prev.flatten(0, 1)).unflatten(0, (5, 2))
    torch.testing.assert_close(log_prob(transition, x_prev), flat)


def test_the_mean_is_the_likeliest_x_prev():
    transition = transition_of(5)
    best = log_prob(transition, transition.mean)
    assert (log_prob(transition, transition.mean + 0.1 * randn(5, 4, 3, 3, seed=3)) < best).all()


def test_half_precision_is_widened():
    transition = transition_of(5)
    half = Transition(transition.mean.half(), transition.std.half(), transition.x_0.half())
    assert log_prob(half, randn(5, 4, 3, 3).half()).dtype == torch.float32


def test_no_pairs_have_no_densities():
    assert log_prob(transition_of(0), randn(0, 2, 4, 3, 3)).shape == (0, 2)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"3 Gaussians do not fit x_prev of shape \(5, 2, 4, 3, 3\); use 5 .* or 10"):
        log_prob(transition_of(3), randn(5, 2, 4, 3, 3))


def test_a_deterministic_step_has_no_density():
    transition = transition_of(5)
    with pytest.raises(ValueError, match="sample with eta > 0"):
        log_prob(Transition(transition.mean, 0 * transition.std, transition.x_0), transition.mean)
