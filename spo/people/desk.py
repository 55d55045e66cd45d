"""Who sees which pair, on which side, and when it comes again."""

import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.errors import DataError
from spo.people.answers import Answer, Answers
from spo.people.pairs import Pair, Pool
from spo.runtime.hashing import short_hash

REPEAT_EVERY = 10  # choices of new pairs for one pair that comes again
REPEAT_GAP = 4  # of the latest choices, none comes again
CHOICES = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Turn:
    """A pair as an annotator sees it."""

    pair: Pair
    left: int  # the picture on the left, 0 or 1
    repeat: bool

    @property
    def id(self) -> str:
        return short_hash(f"{self.pair.id} {self.left} {self.repeat}")


class Desk:
    """Hands out pairs and takes choices, of several people at once.

    everyone: each annotator sees every pair, in an order of their own (a study). Otherwise a pair is for one of them.
    """

    def __init__(self, pool: Pool, answers: Answers, *, everyone: bool):
        self.pool = pool
        self.answers = answers
        self.everyone = everyone
        self._lock = threading.Lock()
        self._turns: dict[str, Turn] = {}  # what each annotator looks at
        self._pictures: dict[str, Path] = {}
        self._salt = secrets.token_hex(8)

    def state(self, annotator: str) -> dict[str, Any]:
        """What the page shows to an annotator."""
        with self._lock:
            return self._state(annotator)

    def choose(self, annotator: str, turn: str, choice: str) -> dict[str, Any] | None:
        """Write a choice, and the next state; None if the annotator no longer looks at this turn."""
        if choice not in CHOICES:
            raise DataError(f"the choice {choice!r:.40} is none; use one of {', '.join(CHOICES)}")
        with self._lock:
            current = self._turn(annotator)
            if current is None or current.id != turn:
                return None
            labels = {"left": 1.0 - current.left, "right": float(current.left), "tie": 0.5}
            self.answers.add(
                annotator, current.pair, label=labels.get(choice), left=current.left, repeat=current.repeat
            )
            del self._turns[annotator]
            return self._state(annotator)

    def undo(self, annotator: str) -> dict[str, Any]:
        """Take the last choice back; its pair is shown again."""
        with self._lock:
            if answers := self.answers.of(annotator):
                last = answers[-1]
                self.answers.undo(annotator)
                self._turns.pop(annotator, None)
                if pair := self.pool.ready.get(last.pair):
                    self._turns[annotator] = Turn(pair, last.left, last.repeat)
            return self._state(annotator)

    def picture(self, name: str) -> Path | None:
        """The file of a picture that some turn has shown; `name` is never used as a path."""
        return self._pictures.get(name)

    def _state(self, annotator: str) -> dict[str, Any]:
        turn = self._turn(annotator)
        same, of = agreement(self.answers.of(annotator))
        state: dict[str, Any] = {
            "annotator": annotator,
            "done": len(self._taken(annotator) & set(self.pool.ready)),
            "mine": sum(answer.label is not None for answer in self.answers.of(annotator)),
            "total": self.pool.total,
            "same": same,
            "repeated": of,
            "can_undo": bool(self.answers.of(annotator)),
            "waiting": turn is None and not self.pool.finished,
            "error": self.pool.error,
            "turn": None,
        }
        if turn is None:
            return state
        left, right = (self._name(turn.pair, i) for i in (turn.left, 1 - turn.left))
        return {**state, "turn": turn.id, "prompt": turn.pair.prompt, "left": left, "right": right}

    def _turn(self, annotator: str) -> Turn | None:
        """What the annotator looks at, the same until they choose; None if no pair is left or ready."""
        if annotator not in self._turns and (turn := self._repeat(annotator) or self._new(annotator)):
            self._turns[annotator] = turn
        return self._turns.get(annotator)

    def _new(self, annotator: str) -> Turn | None:
        held = set() if self.everyone else {turn.pair.id for turn in self._turns.values()}
        taken = self._taken(annotator) | held
        left = [pair for name, pair in self.pool.ready.items() if name not in taken]
        if not left:
            return None
        pair = min(left, key=lambda pair: short_hash(f"{annotator} {pair.id}")) if self.everyone else left[0]
        return Turn(pair, int(short_hash(f"{annotator} left {pair.id}", 1), 16) & 1, repeat=False)

    def _repeat(self, annotator: str) -> Turn | None:
        """An earlier pair with its sides swapped, if one is due."""
        answers, ready = self.answers.of(annotator), self.pool.ready
        fresh = [answer for answer in answers if not answer.repeat and answer.label is not None]
        again = {answer.pair for answer in answers if answer.repeat}
        if len(fresh) // REPEAT_EVERY <= len(again):
            return None
        known = [answer for answer in fresh[:-REPEAT_GAP] if answer.pair in ready and answer.pair not in again]
        if not known:
            return None
        first = min(known, key=lambda answer: short_hash(f"{annotator} again {answer.pair}"))
        return Turn(ready[first.pair], 1 - first.left, repeat=True)

    def _taken(self, annotator: str) -> set[str]:
        names = [annotator] if self.everyone else self.answers.annotators
        return {answer.pair for name in names for answer in self.answers.of(name)}

    def _name(self, pair: Pair, index: int) -> str:
        """A picture's name for the browser, which says nothing about it."""
        name = short_hash(f"{self._salt} {pair.id} {index}")
        self._pictures[name] = pair.pictures[index]
        return name


def agreement(answers: list[Answer]) -> tuple[int, int]:
    """How many of the repeated pairs got the same choice both times, and how many were repeated."""
    first = {answer.pair: answer.label for answer in answers if not answer.repeat}
    both = [(first.get(answer.pair), answer.label) for answer in answers if answer.repeat]
    both = [(one, two) for one, two in both if one is not None and two is not None]
    return sum(one == two for one, two in both), len(both)
