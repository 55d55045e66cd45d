"""The Gaussian step p(x_prev | x_t) of every schedule; for diffusion it is DDIM."""

from torch import Tensor

from spo.core.prediction import PredictionType, predict_x_0_and_noise
from spo.core.schedule import Schedule
from spo.core.types import Transition


def gaussian_step(
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_prev: Tensor,
    *,
    schedule: Schedule,
    eta: float,
    prediction_type: PredictionType,
) -> Transition:
    """p(x_prev | x_t) = N(signal' x_0 + kept eps, std^2 I), which keeps the schedule's marginals.

    x_0 and eps are predicted; `kept` and `std` come from `Schedule.split_noise`. With alpha_bar this is DDIM
    (Song et al., arXiv 2010.02502, eqs. 12 and 16).

    output, x_t: (b, c, h, w); t, t_prev: (b,); eta in [0, 1]: 0 is deterministic, 1 is DDPM's ancestral sampling.
    Raises ValueError for another eta or prediction type.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]; the paper uses 1")
    x_0, eps = predict_x_0_and_noise(output, x_t, schedule.level(t), prediction_type=prediction_type)
    kept, std = schedule.split_noise(t, t_prev, eta=eta)
    return Transition(schedule.level(t_prev).signal * x_0 + kept * eps, std, x_0)
