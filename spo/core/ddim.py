"""The DDIM transition p(x_prev | x_t) (Song et al., arXiv 2010.02502)."""

from typing import Literal

from torch import Tensor

from spo.core.types import Transition

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def ddim_transition(
    model_output: Tensor,
    x_t: Tensor,
    alpha_bar_t: Tensor,
    alpha_bar_prev: Tensor,
    *,
    eta: float,
    prediction_type: PredictionType,
) -> Transition:
    """p(x_prev | x_t) = N(sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - std^2) epsilon, std^2 I), DDIM eq. 12.

    model_output, x_t: (b, c, h, w); alpha_bar_t, alpha_bar_prev: (b,) in (0, 1], float32 or wider;
    eta in [0, 1]: 0 is deterministic, 1 is ancestral sampling as in DDPM.
    Raises ValueError for another eta or prediction type.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]; the paper uses 1")
    alpha_bar_t = alpha_bar_t.reshape(-1, 1, 1, 1)
    alpha_bar_prev = alpha_bar_prev.reshape(-1, 1, 1, 1)
    x_0, epsilon = predictions(model_output, x_t, alpha_bar_t, prediction_type=prediction_type)
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta=eta)
    mean = alpha_bar_prev.sqrt() * x_0 + (1 - alpha_bar_prev - std**2).sqrt() * epsilon
    return Transition(mean, std, x_0)


def ddim_std(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, *, eta: float) -> Tensor:
    """std = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev), DDIM eq. 16.

    In float32 the last factor cancels: at t = 1 its rounding is 1e-4 of it. The operations are therefore those of the
    published code, in its order, so that both round alike.
    """
    return eta * ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)).sqrt()


def predictions(
    model_output: Tensor, x_t: Tensor, alpha_bar_t: Tensor, *, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """The x_0 and epsilon, both (b, c, h, w), that a model output means, so that DDIM eq. 9 holds:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon. v is of Salimans and Ho (arXiv 2202.00512).
    alpha_bar_t must broadcast against x_t. Raises ValueError for another prediction type.
    """
    signal, noise = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    match prediction_type:
        case "epsilon":
            return (x_t - noise * model_output) / signal, model_output
        case "v_prediction":
            return signal * x_t - noise * model_output, signal * model_output + noise * x_t
        case "sample":
            return model_output, (x_t - signal * model_output) / noise
        case _:
            raise ValueError(f"prediction_type={prediction_type!r} is unknown; use epsilon, v_prediction or sample")
