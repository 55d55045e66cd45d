import diffusers
import pytest
import torch

from spo.core.ddim import ddim_std, ddim_transition, predictions
from spo.core.gaussian import sample
from spo.core.schedule import alpha_bar_table, timestep_grid

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alpha_bars():
    """(t, t_prev) over the whole grid, float64: alpha_bar_t, alpha_bar_prev (20,)."""
    grid = timestep_grid(20, num_train_timesteps=1000, steps_offset=1)
    table = alpha_bar_table(**SCHEDULE).double()
    return table[grid], table[(grid - 50).clamp(min=0)]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_is_diffusers_step(prediction_type, eta):
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        set_alpha_to_one=False,  # then the last step goes to timestep 0, as the published code's does
        clip_sample=False,
    )
    scheduler.set_timesteps(20)
    model_output, x_t, noise = (randn(1, 4, 8, 8, seed=seed).float() for seed in range(3))
    for t in scheduler.timesteps:
        ours = ddim_transition(
            model_output,
            x_t,
            scheduler.alphas_cumprod[t].view(1),
            scheduler.alphas_cumprod[max(t - 50, 0)].view(1),
            eta=eta,
            prediction_type=prediction_type,
        )
        theirs = scheduler.step(model_output, t, x_t, eta=eta, variance_noise=noise)
        torch.testing.assert_close(ours.x_0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample(ours, noise), theirs.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions_recompose_x_t(prediction_type):
    alpha_bar_t = alpha_bars()[0].view(-1, 1, 1, 1)
    model_output, x_t = randn(20, 4, 3, 3), randn(20, 4, 3, 3, seed=1)
    x_0, epsilon = predictions(model_output, x_t, alpha_bar_t, prediction_type=prediction_type)
    torch.testing.assert_close(alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * epsilon, x_t)


def test_the_prediction_types_agree_on_the_same_x_0():
    alpha_bar_t, alpha_bar_prev = alpha_bars()
    x_0, epsilon = randn(20, 4, 3, 3), randn(20, 4, 3, 3, seed=1)
    signal, noise = alpha_bar_t.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar_t).sqrt().view(-1, 1, 1, 1)
    x_t = signal * x_0 + noise * epsilon
    outputs = {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * x_0, "sample": x_0}
    for prediction_type, output in outputs.items():
        transition = ddim_transition(output, x_t, alpha_bar_t, alpha_bar_prev, eta=1.0, prediction_type=prediction_type)
        torch.testing.assert_close(transition.x_0, x_0)


def test_mean_and_std_keep_the_marginal_of_the_forward_process():
    """If x_t ~ N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t), so is x_prev at t_prev: DDIM's lemma 1, for every eta."""
    alpha_bar_t, alpha_bar_prev = alpha_bars()
    x_0 = randn(20, 4, 3, 3)
    signal, noise = alpha_bar_t.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar_t).sqrt().view(-1, 1, 1, 1)
    for eta in (0.0, 0.5, 1.0):

        def mean_of(epsilon, eta=eta):
            x_t = signal * x_0 + noise * epsilon
            return ddim_transition(epsilon, x_t, alpha_bar_t, alpha_bar_prev, eta=eta, prediction_type="epsilon")

        at_zero, at_one = mean_of(torch.zeros_like(x_0)), mean_of(torch.ones_like(x_0))
        torch.testing.assert_close(at_zero.mean, alpha_bar_prev.sqrt().view(-1, 1, 1, 1) * x_0)
        variance = (at_one.mean - at_zero.mean) ** 2 + at_zero.std**2
        torch.testing.assert_close(variance, (1 - alpha_bar_prev).view(-1, 1, 1, 1).expand_as(variance))


def test_std_is_proportional_to_eta_and_ddpms_at_eta_1():
    alpha_bar_t, alpha_bar_prev = alpha_bars()
    beta = 1 - alpha_bar_t / alpha_bar_prev
    posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar_t)  # DDPM eq. 7
    torch.testing.assert_close(ddim_std(alpha_bar_t, alpha_bar_prev, eta=1.0) ** 2, posterior_variance)
    half = ddim_std(alpha_bar_t, alpha_bar_prev, eta=0.5)
    torch.testing.assert_close(2 * half, ddim_std(alpha_bar_t, alpha_bar_prev, eta=1.0))
    assert (half > 0).all()  # the last step's, too


def test_a_half_precision_output_gives_a_float32_transition():
    x = randn(2, 4, 3, 3).half()
    alpha_bar_t, alpha_bar_prev = torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.6])
    transition = ddim_transition(x, x, alpha_bar_t, alpha_bar_prev, eta=1.0, prediction_type="v_prediction")
    assert transition.mean.dtype == transition.std.dtype == transition.x_0.dtype == torch.float32
    assert transition.std.shape == (2, 1, 1, 1)


def test_wrong_arguments_are_named():
    x, half = randn(1, 4, 3, 3), torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"eta=1.5 must lie in \[0, 1\]"):
        ddim_transition(x, x, half, half, eta=1.5, prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type='flow' is unknown; use epsilon, v_prediction or sample"):
        ddim_transition(x, x, half, half, eta=1.0, prediction_type="flow")
