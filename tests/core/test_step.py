import diffusers
import pytest
import torch

from spo.core.gaussian import sample
from spo.core.schedule import RectifiedFlow, VariancePreserving, marginal_preserving_split
from spo.core.step import gaussian_step
from tests.schedules import grid, previous, stable_diffusion

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
FLOW = RectifiedFlow()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(schedule: VariancePreserving) -> VariancePreserving:
    return VariancePreserving(schedule.alpha_bar.double())


def cases():
    """A schedule of each kind with (t, t_prev) over a grid of 20, in float64; flow's first step starts at signal 0."""
    t = grid(20)
    sigmas = torch.linspace(1, 0, 21, dtype=torch.float64)
    return [
        pytest.param(double(stable_diffusion()), t, previous(t, steps=20), "epsilon", id="diffusion"),
        pytest.param(FLOW, 1000 * sigmas[:-1], 1000 * sigmas[1:], "flow", id="flow"),
    ]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_of_diffusion_is_diffusers_ddim(prediction_type, eta):
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        set_alpha_to_one=False,  # then the last step goes to timestep 0, as the published code's does
        clip_sample=False,
    )
    scheduler.set_timesteps(20)
    output, x_t, noise = (randn(1, 4, 8, 8, seed=seed).float() for seed in range(3))
    for t in scheduler.timesteps:
        ours = gaussian_step(
            output,
            x_t,
            t.view(1),
            (t.view(1) - 50).clamp(min=0),
            schedule=stable_diffusion(),
            eta=eta,
            prediction_type=prediction_type,
        )
        theirs = scheduler.step(output, t, x_t, eta=eta, variance_noise=noise)
        torch.testing.assert_close(ours.x_0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample(ours, noise), theirs.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given_sigmas", [False, True])
def test_a_step_of_flow_at_eta_0_is_diffusers_euler_step(given_sigmas):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10, sigmas=torch.linspace(1, 0.1, 10).tolist() if given_sigmas else None)
    output, x_t = (randn(1, 4, 8, 8, seed=seed).float() for seed in range(2))
    for t, t_prev in zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(0.0)], strict=True):
        ours = gaussian_step(output, x_t, t.view(1), t_prev.view(1), schedule=FLOW, eta=0.0, prediction_type="flow")
        theirs = scheduler.step(output, t, x_t).prev_sample
        torch.testing.assert_close(ours.mean, theirs, rtol=1e-5, atol=1e-5)
        assert not ours.std.any()


@pytest.mark.parametrize(("schedule", "t", "t_prev", "prediction_type"), cases())
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_mean_and_std_keep_the_marginals_of_the_schedule(schedule, t, t_prev, prediction_type, eta):
    """If x_t is signal x_0 + noise eps with the true x_0 known, x_prev is distributed as at t_prev: for every eta."""
    x_0, now, then = randn(20, 4, 3, 3), schedule.level(t), schedule.level(t_prev)

    def step(eps):
        output = eps if prediction_type == "epsilon" else eps - x_0
        x_t = now.signal * x_0 + now.noise * eps
        return gaussian_step(output, x_t, t, t_prev, schedule=schedule, eta=eta, prediction_type=prediction_type)

    at_zero, at_one = step(torch.zeros_like(x_0)), step(torch.ones_like(x_0))
    torch.testing.assert_close(at_zero.mean, then.signal * x_0)
    variance = (at_one.mean - at_zero.mean) ** 2 + at_zero.std**2
    torch.testing.assert_close(variance, (then.noise**2).expand_as(variance))


def test_diffusions_std_is_the_one_form_of_every_schedule():
    """VariancePreserving keeps the published order of operations; in float64 it equals the general formula."""
    schedule, t = double(stable_diffusion()), grid(20)
    t_prev = previous(t, steps=20)
    for eta in (0.3, 1.0):
        ours = schedule.split_noise(t, t_prev, eta=eta)
        general = marginal_preserving_split(schedule.level(t), schedule.level(t_prev), eta=eta)
        torch.testing.assert_close(ours, general, rtol=1e-9, atol=1e-12)


def test_std_is_proportional_to_eta_and_ddpms_at_eta_1():
    schedule, t = double(stable_diffusion()), grid(20)
    t_prev = previous(t, steps=20)
    now, then = schedule.alpha_bar[t], schedule.alpha_bar[t_prev]
    posterior_variance = (1 - now / then) * (1 - then) / (1 - now)  # DDPM eq. 7
    (_, half), (_, full) = (schedule.split_noise(t, t_prev, eta=eta) for eta in (0.5, 1.0))
    torch.testing.assert_close(full.flatten() ** 2, posterior_variance)
    torch.testing.assert_close(2 * half, full)
    assert (full > 0).all()  # the last step's, too


def test_flows_first_step_is_all_fresh_noise_and_its_last_has_none():
    t, t_prev = torch.tensor([1000.0, 300.0]), torch.tensor([900.0, 0.0])
    kept, std = FLOW.split_noise(t, t_prev, eta=1.0)
    torch.testing.assert_close(std.flatten(), torch.tensor([0.9, 0.0]))
    assert not kept.any()


def test_a_half_precision_output_gives_a_float32_transition():
    x = randn(2, 4, 3, 3).half()
    t, t_prev = torch.tensor([501, 301]), torch.tensor([451, 251])
    transition = gaussian_step(x, x, t, t_prev, schedule=stable_diffusion(), eta=1.0, prediction_type="v_prediction")
    assert transition.mean.dtype == transition.std.dtype == transition.x_0.dtype == torch.float32
    assert transition.std.shape == (2, 1, 1, 1)


def test_wrong_arguments_are_named():
    x, t = randn(1, 4, 3, 3), torch.tensor([501])
    with pytest.raises(ValueError, match=r"eta=1.5 must lie in \[0, 1\]"):
        gaussian_step(x, x, t, t - 50, schedule=stable_diffusion(), eta=1.5, prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type='velocity' is unknown; use epsilon, v_prediction, sample"):
        gaussian_step(x, x, t, t - 50, schedule=stable_diffusion(), eta=1.0, prediction_type="velocity")
