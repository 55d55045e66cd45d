"""What a diffusion model is trained to output."""

from torch import Tensor


def denoising_target(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor, *, prediction_type: str) -> Tensor:
    """The model output that would be right for x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

    x_0, noise: (n, c, h, w); alpha_bar_t: (n,). The noise itself for `epsilon`, x_0 for `sample`, and for
    `v_prediction` v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 (arXiv 2202.00512, appendix D).
    Raises ValueError for another prediction_type.
    """
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "v_prediction":
            alpha_bar_t = alpha_bar_t.view(-1, 1, 1, 1)
            return alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * x_0
    raise ValueError(f"prediction_type={prediction_type!r} is unknown; use epsilon, sample or v_prediction")
