"""The profile and overrides of settings: they are written to the files that DVC and the stages read.

`dvc repro` takes no settings, and `dvc exp run --set-param` needs a commit and no other changes. So an override edits
the profile's file or params.yaml and keeps their comments. All overrides are checked before the first is written. At
the end of the run the files are as before, so that the next run starts from the settings of the project.
"""

import io
import re
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from spo.config import load_config
from spo.errors import ConfigError
from spo.runtime.files import read_json, write_json, write_text

KEPT = Path(".cache", "flows", "settings.json")  # the files that a run changes: as they were, and as it wrote them


@contextmanager
def settings_of_run(profile: str | None, overrides: Mapping[str, Any], root: Path = Path()) -> Iterator[list[str]]:
    """Inside this context the files hold the run's profile and overrides; yields a line for each change.

    Afterwards the files are as before, except those that someone else has changed meanwhile. What a killed run left is
    put back first. ConfigError, with nothing written, where the settings would be invalid.
    """
    _put_back(root)
    places = [Path("params.yaml"), *(path.relative_to(root) for path in (root / "configs").glob("*.yaml"))]
    before = {place: (root / place).read_text(encoding="utf-8") for place in places if (root / place).is_file()}
    try:
        changes = override(profile, overrides, root)
        name = use_profile(profile, root)
        after = {place: (root / place).read_text(encoding="utf-8") for place in before}
        changed = {str(place): [text, after[place]] for place, text in before.items() if after[place] != text}
        write_json(root / KEPT, changed)
        yield [*changes, f"profile {name}"]
    finally:
        _put_back(root)


def _put_back(root: Path) -> None:
    if not (root / KEPT).is_file():
        return
    for place, (before, written) in read_json(root / KEPT).items():
        if (root / place).is_file() and (root / place).read_text(encoding="utf-8") == written:
            write_text(root / place, before)
    (root / KEPT).unlink()


def use_profile(profile: str | None, root: Path = Path()) -> str:
    """Write `profile` into params.yaml, change nothing else there, and return it; None keeps the profile.

    ConfigError if there is no such profile.
    """
    path = root / "params.yaml"
    if not path.is_file():
        raise ConfigError(f"{path.absolute()} is missing; run from the project's folder")
    text = path.read_text(encoding="utf-8")
    current = (YAML(typ="safe").load(text) or {}).get("profile")
    name = profile or current
    known = sorted(config.stem for config in (root / "configs").glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"profile is {name!r}; use one of {known}, or write configs/{name}.yaml")
    if name != current:
        changed, found = re.subn("^profile:.*$", f"profile: {name}", text, count=1, flags=re.MULTILINE)
        write_text(path, changed if found else f"profile: {name}\n{text}")
    return name


def override(profile: str | None, overrides: Mapping[str, Any], root: Path = Path()) -> list[str]:
    """Write `overrides` into the files that they name; returns a line for each change.

    A key is FILE:SECTION.KEY, such as configs/tiny.yaml:align.spo.beta or params.yaml:methods; without FILE: it belongs
    to the profile's file. ConfigError, with nothing written, where the settings would be invalid.
    """
    if not overrides:
        return []
    name = profile or load_config(root).profile
    documents: dict[Path, Any] = {}
    changes = []
    for key, value in overrides.items():
        file, _, path = key.rpartition(":")
        place = Path(file or f"configs/{name}.yaml")
        if place not in documents:
            documents[place] = _read(place, root)
        before = _put(documents[place], path.split("."), value, key)
        changes.append(f"{place}: {path} is {value!r}, was {before!r}")
    texts = {}
    for place, document in documents.items():
        buffer = io.StringIO()
        _yaml().dump(document, buffer)
        texts[place] = buffer.getvalue()
    _validate(name, texts, root)
    for place, text in texts.items():
        write_text(root / place, text)
    return changes


def _read(place: Path, root: Path) -> Any:
    allowed = [Path("params.yaml"), *(path.relative_to(root) for path in sorted((root / "configs").glob("*.yaml")))]
    if place not in allowed:
        raise ConfigError(f"overrides name {place}; use one of {[str(path) for path in allowed]}")
    return _yaml().load((root / place).read_text(encoding="utf-8"))


def _put(document: Any, path: list[str], value: Any, key: str) -> Any:
    """Set a nested value; returns the old one."""
    *sections, last = path
    for section in sections:
        document = document.setdefault(section, {}) if isinstance(document, MutableMapping) else None
    if not isinstance(document, MutableMapping):
        raise ConfigError(f"overrides name {key}, but {'.'.join(sections)} is no section")
    before = document.get(last)
    document[last] = value
    return before


def _validate(profile: str, texts: Mapping[Path, str], root: Path) -> None:
    """Load the changed configuration from a temporary folder; ConfigError if it is invalid."""
    with tempfile.TemporaryDirectory() as temporary:
        for path in (root / "params.yaml", *(root / "configs").glob("*.yaml")):
            place = path.relative_to(root)
            copy = Path(temporary) / place
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(texts.get(place) or path.read_text(encoding="utf-8"), encoding="utf-8")
        try:
            load_config(Path(temporary), profile)
        except ConfigError as error:
            raise ConfigError(f"overrides: {str(error).replace(temporary + '/', '')}") from None


def parse(texts: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE from a command line; the value is YAML."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no value; write KEY=VALUE, e.g. align.spo.beta=5")
        try:
            found[key] = YAML(typ="safe").load(value)
        except YAMLError:
            raise ConfigError(f"--set {text!r}: the value is no YAML") from None
    return found


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml
