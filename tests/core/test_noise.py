import pytest
import torch

from spo.core.noise import KeyedNoise

SHAPE = (4, 3, 3)


def test_a_prompts_noise_does_not_depend_on_its_batch():
    together = KeyedNoise(0, 1, [7, 3, 11])
    for row, prompt_id in enumerate([7, 3, 11]):
        alone = KeyedNoise(0, 1, [prompt_id])
        assert torch.equal(together.normal(5, SHAPE)[row], alone.normal(5, SHAPE)[0])
        assert together.choice(5, 1000)[row] == alone.choice(5, 1000)[0]


def test_noise_does_not_depend_on_the_order_of_calls_or_on_global_state():
    forward, backward = KeyedNoise(0, 1, [7, 3]), KeyedNoise(0, 1, [7, 3])
    first = [forward.normal(step, SHAPE) for step in (-1, 0, 1)]
    torch.manual_seed(99)
    backward.choice(0, 4)
    last = [backward.normal(step, SHAPE) for step in (1, 0, -1)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(last), strict=True))


def test_drawing_noise_leaves_global_state_alone():
    before = torch.get_rng_state()
    KeyedNoise(0, 1, [7, 3]).normal(0, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_part_of_the_key_counts():
    draws = [
        KeyedNoise(seed, epoch, [prompt_id]).normal(step, SHAPE)
        for seed in (0, 1)
        for epoch in (0, 1)
        for prompt_id in (0, 1)
        for step in (-1, 0, 1)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 24


def test_numbers_are_the_same_in_every_process():
    assert KeyedNoise(0, 0, [0, 1]).choice(0, 1_000_000).tolist() == [922011, 627057]


def test_normal_is_standard_normal():
    draws = KeyedNoise(0, 0, range(200)).normal(0, (10, 10))
    assert draws.shape == (200, 10, 10)
    assert abs(draws.mean()) < 0.03
    assert abs(draws.std() - 1) < 0.03


def test_choice_is_uniform():
    counts = KeyedNoise(0, 0, range(2000)).choice(3, 4).bincount(minlength=4)
    assert len(counts) == 4
    assert ((counts > 430) & (counts < 570)).all()


def test_the_choice_is_independent_of_the_normal_numbers():
    noise = KeyedNoise(0, 0, range(2000))
    positive = noise.normal(0, (1,)).flatten() > 0
    assert abs(noise.choice(0, 2)[positive].float().mean() - 0.5) < 0.06


def test_noise_for_no_prompts_is_refused():
    with pytest.raises(ValueError, match="needs at least one prompt"):
        KeyedNoise(0, 0, [])
