"""The meaning of a network's output, its training target, and guidance."""

from typing import Literal

from torch import Tensor

from spo.core.schedule import Level

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


def predict_x_0_and_noise(
    output: Tensor, x_t: Tensor, level: Level, *, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """The predicted x_0 and eps, each (b, c, h, w), with x_t = signal x_0 + noise eps.

    `v_prediction` is from Salimans and Ho (arXiv 2202.00512); `flow` is the velocity eps - x_0 of rectified flow, whose
    signal and noise sum to 1. Raises ValueError for another prediction type.
    """
    signal, noise = level.signal, level.noise
    match prediction_type:
        case "epsilon":
            return (x_t - noise * output) / signal, output
        case "v_prediction":
            return signal * x_t - noise * output, signal * output + noise * x_t
        case "sample":
            return output, (x_t - signal * output) / noise
        case "flow":
            return x_t - noise * output, x_t + signal * output
        case _:
            raise ValueError(_unknown(prediction_type))


def training_target(x_0: Tensor, eps: Tensor, level: Level, *, prediction_type: PredictionType) -> Tensor:
    """The correct output (b, c, h, w) for x_t = signal x_0 + noise eps. Raises ValueError as above."""
    match prediction_type:
        case "epsilon":
            return eps
        case "v_prediction":
            return level.signal * eps - level.noise * x_0
        case "sample":
            return x_0
        case "flow":
            return eps - x_0
        case _:
            raise ValueError(_unknown(prediction_type))


def guide(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of two outputs of one shape; scale 1 is no guidance, SPO uses 5."""
    return negative + scale * (positive - negative)


def _unknown(prediction_type: str) -> str:
    return f"prediction_type={prediction_type!r} is unknown; use epsilon, v_prediction, sample or flow"
