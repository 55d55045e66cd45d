"""The layouts of preference data: which columns hold the caption, the images, and what people prefer.

Pick-a-Pic: two images and two labels. Winner and loser: two images, as in HPDv3 (path1 is the winner). Ranking: a list
of images with a rank for each (ImageReward, HPDv2's test set; 1 is the best), or a preference for each (HPDv2).
Comparisons: a list of images, and a list of [first, second, label_0], which compares two of them by their places.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from spo.data.rows import RowError

CAPTION = ("caption", "prompt")
LABELLED = {  # of a field, and what files call it
    "caption": CAPTION,
    "image_0": ("image_0", "jpg_0"),
    "image_1": ("image_1", "jpg_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
}
DECIDED = [
    {"caption": CAPTION, "win": (win,), "lose": (lose,)}
    for win, lose in (
        ("win", "lose"),
        ("image_win", "image_lose"),
        ("winner", "loser"),
        ("chosen", "rejected"),
        ("path1", "path2"),
    )
]
IMAGES = ("image_path", "generations", "images")
RANKED = [
    {"caption": CAPTION, "images": IMAGES, "preferences": ("human_preference",)},
    {"caption": CAPTION, "images": IMAGES, "ranks": ("rank", "ranking")},
]
COMPARED = {"caption": CAPTION, "images": IMAGES, "comparisons": ("comparisons",)}


@dataclass(frozen=True)
class Layout:
    columns: Mapping[str, str]  # of a field, its name in the file

    def pairs(self, record: Mapping[str, object], image: Callable[[object], object]) -> Iterator[dict[str, object]]:
        """The fields of LABELLED of each pair in a record; `image` reads one. RowError if the record is broken."""
        fields = {key: record[name] for key, name in self.columns.items()}
        if "comparisons" in fields:
            yield from _compared(fields, image)
        elif "images" in fields:
            yield from _ranked(fields, image)
        elif "win" in fields:
            yield _pair(fields["caption"], image(fields["win"]), image(fields["lose"]), 1.0)
        else:
            yield fields | {key: image(fields[key]) for key in ("image_0", "image_1")}


def find_layout(names: Sequence[str], reason: str) -> Layout:
    """The layout whose columns are all among `names`; RowError with `reason` if there is none."""
    for columns in (LABELLED, *DECIDED, COMPARED, *RANKED):
        found = {key: next((name for name in known if name in names), "") for key, known in columns.items()}
        if all(found.values()):
            return Layout(found)
    missing = [" or ".join(known) for known in LABELLED.values() if not set(known) & set(names)]
    raise RowError(reason, f"no {', '.join(missing)}; there are {', '.join(map(str, names))}")


def _ranked(fields: Mapping[str, object], image: Callable[[object], object]) -> Iterator[dict[str, object]]:
    """All pairs of the images; equal ranks are a tie."""
    sources, values = fields["images"], fields.get("preferences", fields.get("ranks"))
    if not isinstance(sources, list) or not isinstance(values, list) or not 2 <= len(sources) == len(values):
        raise RowError("ranks do not fit", f"{sources} and {values}: a list of images and one of as many numbers")
    if not all(isinstance(value, int | float) for value in values):
        raise RowError("ranks do not fit", f"{values} are no numbers")
    best_first = "ranks" in fields
    images = [image(source) for source in sources]
    for i, j in combinations(range(len(images)), 2):
        label = 0.5 if values[i] == values[j] else float((values[i] < values[j]) == best_first)
        yield _pair(fields["caption"], images[i], images[j], label)


def _compared(fields: Mapping[str, object], image: Callable[[object], object]) -> Iterator[dict[str, object]]:
    """A pair for each comparison; each image is read once."""
    sources, comparisons = fields["images"], fields["comparisons"]
    if not isinstance(sources, list) or not isinstance(comparisons, list):
        raise RowError("comparisons do not fit", f"{sources} and {comparisons}: a list of images and one of lists")
    images = [image(source) for source in sources]
    for comparison in comparisons:
        numbers = isinstance(comparison, list) and all(isinstance(value, int | float) for value in comparison)
        if not numbers or len(comparison) != 3:
            raise RowError("comparisons do not fit", f"{comparison} is no [first, second, label_0]")
        first, second, label = comparison
        if first not in range(len(images)) or second not in range(len(images)):
            raise RowError("comparisons do not fit", f"{comparison} for {len(images)} images, which count from 0")
        yield _pair(fields["caption"], images[int(first)], images[int(second)], label)


def _pair(caption: object, image_0: object, image_1: object, label_0: float) -> dict[str, object]:
    return {"caption": caption, "image_0": image_0, "image_1": image_1, "label_0": label_0, "label_1": 1 - label_0}
