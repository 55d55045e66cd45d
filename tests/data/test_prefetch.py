import threading

import pytest

from spo.data.prefetch import ahead


def test_results_come_in_order_though_later_ones_are_ready_first() -> None:
    second = threading.Event()

    def slow_first(i: int) -> int:
        if i == 0:
            assert second.wait(300), "nothing was worked on beside the first"  # at once, unless the machine is busy
        elif i == 1:
            second.set()
        return 10 * i

    assert list(ahead(slow_first, range(5), depth=2)) == [0, 10, 20, 30, 40]


def test_no_more_is_taken_than_asked_for_and_the_depth() -> None:
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = ahead(lambda i: i, items(), depth=3)
    assert [next(results), next(results)] == [0, 1]
    assert len(taken) == 2 + 3
    results.close()
    assert len(taken) == 2 + 3


def test_an_error_comes_in_its_item_s_place() -> None:
    results = ahead(lambda i: 6 // i, [3, 2, 0, 1], depth=2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_nothing_gives_nothing() -> None:
    assert list(ahead(str, [], depth=4)) == []
