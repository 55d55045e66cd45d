import pytest
import torch

from spo.core.precision import all_finite

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 2), (-1, -1)])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(
    dtype: torch.dtype, bad: float, place: tuple[int, int]
) -> None:
    x = torch.linspace(-9, 9, 35).view(5, 7)
    assert all_finite(x.to(dtype))
    x[place] = bad
    assert not all_finite(x.to(dtype))
    assert not all_finite(x.to(dtype).T)


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([True]), torch.tensor(3), torch.tensor([3e38, 3e38])])
def test_nothing_whole_numbers_and_large_ones_are_finite(x: torch.Tensor) -> None:
    assert all_finite(x)
