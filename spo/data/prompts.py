"""Prompts: read from a user's file, checked, and split by hash so that no prompt is on two sides."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spo.config import Config
from spo.data.prompt_files import prompt_rows
from spo.data.rows import Rejected, RowError, count_reasons, nothing_usable
from spo.errors import DataError
from spo.runtime.hashing import short_hash

MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class Split:
    """Prompts of the three sides, each in the order of its hashes, so the first n are a random sample."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def shortfalls(self, config: Config) -> dict[str, str]:
        """For each setting that asks for more prompts than its side has, by dotted name: what happens."""
        evaluate, whole = config.evaluate, len(self.train) + len(self.validation) + len(self.test)
        asked = {
            "num_prompts": ("test", self.test, evaluate.num_prompts),
            "num_validation_prompts": ("validation", self.validation, evaluate.num_validation_prompts),
        }
        return {
            f"evaluate.{name}": f"only {len(prompts)} of {whole} prompts are {side} prompts, fewer than the {number} "
            f"asked for; all of them are evaluated; give more prompts, or raise prepare.{side}_fraction"
            for name, (side, prompts, number) in asked.items()
            if len(prompts) < number
        }


def check_prompt(value: object) -> str:
    """The prompt in NFC with single spaces; RowError if it is empty, too long, no text or has control characters."""
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, str):
        raise RowError("not a string", value)
    categories = {unicodedata.category(character) for character in value if character not in "\t\n\r"}
    if "Cs" in categories:
        raise RowError("broken Unicode", value)
    if "Cc" in categories:
        raise RowError("control character", repr(value))
    prompt = " ".join(unicodedata.normalize("NFC", value).split())
    if categories <= {"Cf", "Zs", "Zl", "Zp"}:  # no visible character
        raise RowError("empty", prompt)
    if len(prompt) > MAX_CHARACTERS:
        raise RowError("too long", f"{len(prompt)} characters, at most {MAX_CHARACTERS}: {prompt}")
    return prompt


def read_prompts(
    path: Path, *, field: str | None = None, max_prompts: int | None = None
) -> tuple[list[str], list[Rejected]]:
    """Read distinct prompts in the order of `prompt_rows`, at most `max_prompts`, and the rows rejected on the way.

    Prompts that differ only in capitals are one: CLIP's tokenizer makes them the same. DataError if the source cannot
    be read, the `field` of the prompt is not clear, or no row is usable.
    """
    kept: dict[str, str] = {}
    rejected: list[Rejected] = []
    for row in prompt_rows(path, field):
        try:
            prompt = check_prompt(row.value)
            if prompt.lower() in kept:
                raise RowError("duplicate", prompt)
        except RowError as error:
            rejected.append(error.at(row.source, row.number))
            continue
        kept[prompt.lower()] = prompt
        if len(kept) == max_prompts:
            break
    if not kept:
        raise nothing_usable("prompts", path, count_reasons(rejected), rejected[0] if rejected else None)
    return list(kept.values()), rejected


def prompt_hash(prompt: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the seed and the normalised prompt, whatever its capitals."""
    return (int(short_hash(f"{seed}\n{prompt.lower()}", 8), 16) >> 11) / 2**53


def split_prompts(prompts: Sequence[str], *, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    """Rank distinct prompts by hash and cut: round(fraction * n) for validation, then test, the rest for training.

    Each side gets at least two, since one prompt gives no interval; DataError if none is left to train on.
    """
    ranked = sorted(prompts, key=lambda prompt: (prompt_hash(prompt, seed), prompt))
    num_validation, num_test = (max(2, round(share * len(ranked))) for share in (validation_fraction, test_fraction))
    held_out = num_validation + num_test
    if held_out >= len(ranked):
        raise DataError(
            f"{len(ranked)} prompts cannot be split into {num_validation} for validation, {num_test} for test and "
            "some for training; give more prompts"
        )
    return Split(tuple(ranked[held_out:]), tuple(ranked[:num_validation]), tuple(ranked[num_validation:held_out]))


def split_of(prompts: Sequence[str], config: Config) -> Split:
    """`split_prompts` by the profile's seed and fractions."""
    prepare = config.prepare
    return split_prompts(
        prompts,
        seed=config.seed,
        validation_fraction=prepare.validation_fraction,
        test_fraction=prepare.test_fraction,
    )
