"""Sizes for pictures of different aspect."""

import math

import pytest

from spo.data.buckets import WIDEST, bucket_sizes, nearest_bucket


@pytest.mark.parametrize(("size", "step"), [((512, 512), 64), ((1024, 1024), 64), ((512, 768), 32), ((64, 64), 8)])
def test_buckets_have_at_most_the_area_and_nearly_all_of_it(size: tuple[int, int], step: int) -> None:
    sizes = bucket_sizes(size, step)
    assert sizes[0] == size and len(set(sizes)) == len(sizes)
    for height, width in sizes[1:]:
        assert height % step == width % step == 0
        assert height * width <= math.prod(size) < (min(height, width)) * (max(height, width) + step)
        assert max(height, width) <= WIDEST * min(height, width)
        assert (width, height) in sizes


def test_without_a_step_there_is_one_size() -> None:
    assert bucket_sizes((512, 768), None) == [(512, 768)]


def test_pictures_go_where_the_aspect_is_nearest() -> None:
    sizes = bucket_sizes((512, 512), 64)
    assert sizes[nearest_bucket(sizes, [(1000, 1000)])] == (512, 512)
    assert sizes[nearest_bucket(sizes, [(900, 600)])] == (640, 384)
    assert sizes[nearest_bucket(sizes, [(100, 9000)])] == (256, 1024)
    assert sizes[nearest_bucket(sizes, [(1000, 600), (600, 1000)])] == (512, 512)
