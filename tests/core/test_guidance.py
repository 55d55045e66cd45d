import torch

from spo.core.guidance import guide


def test_scale_1_is_the_conditional_and_scale_0_the_unconditional_prediction():
    negative, positive = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    torch.testing.assert_close(guide(negative, positive, 1.0), positive)
    torch.testing.assert_close(guide(negative, positive, 0.0), negative)


def test_guidance_extrapolates_linearly():
    negative, positive = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    torch.testing.assert_close(guide(negative, positive, 5.0), torch.tensor([11.0, 33.0]))
