"""The profile and overrides of settings: they are written to the files that DVC and the stages read.

`dvc repro` takes no settings, and `dvc exp run --set-param` needs a commit and no other changes. So an override edits
the profile's file or params.yaml and keeps their comments. All are checked before the first is written. At the end of
the run the files are as before, unless the run was told to keep them.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from spo.config import load_config
from spo.errors import ConfigError, one_line
from spo.runtime.files import read_json, write_json, write_text

KEPT = Path(".cache", "flows", "settings.json")  # the files that a run changes: as they were, and as it wrote them


@contextmanager
def settings_of_run(
    profile: str | None, overrides: Mapping[str, Any], root: Path = Path(), *, keep: bool = False
) -> Iterator[list[str]]:
    """Inside this context the files hold the run's profile and overrides; yields a line for each change.

    Afterwards the files are as before, except those that someone else has changed meanwhile; `keep` leaves them. What a
    killed run left is put back first, and a run that is active in this folder is waited for. ConfigError, with nothing
    written, where the settings would be invalid.
    """
    kept = root / KEPT
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock"), thread_local=False):
        _put_back(root)
        changed, lines = _changes(profile, overrides, root)
        if not keep:  # noted before the first is written, so that a killed run's are put back, too
            write_json(kept, changed)
        for place, (_, text) in changed.items():
            write_text(root / place, text)
        try:
            yield lines
        finally:
            _put_back(root)


def _changes(
    profile: str | None, overrides: Mapping[str, Any], root: Path
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """The files that change, as they are and will be, and a line for each change; made and checked in a copy."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        (copy / "configs").mkdir()
        for path in (root / "params.yaml", *(root / "configs").glob("*.yaml")):
            if path.is_file():
                shutil.copy(path, copy / path.relative_to(root))
        try:
            lines = [f"profile {use_profile(profile, copy)}"]
            lines += override(overrides, copy)
            load_config(copy)
        except (ConfigError, YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(one_line(error, 1000).replace(f"{temporary}/", "")) from None
        places = [path.relative_to(copy) for path in copy.rglob("*.yaml")]
        texts = {str(place): ((root / place).read_text("utf-8"), (copy / place).read_text("utf-8")) for place in places}
    return {place: (before, after) for place, (before, after) in texts.items() if before != after}, lines


def _put_back(root: Path) -> None:
    """Undo what `settings_of_run` has noted, where nobody else has changed it."""
    if not (root / KEPT).is_file():
        return
    for place, (before, written) in read_json(root / KEPT).items():
        if (root / place).is_file() and (root / place).read_text(encoding="utf-8") == written:
            write_text(root / place, before)
    (root / KEPT).unlink()


def profile_name(profile: str | None, root: Path = Path()) -> str:
    """`profile`, or the one that params.yaml names; ConfigError if there is no such profile."""
    path = root / "params.yaml"
    if not path.is_file():
        raise ConfigError(f"{path.absolute()} is missing; run from the project's folder")
    try:
        name = profile or (YAML(typ="safe").load(path) or {}).get("profile")
    except (YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {one_line(error)}") from None
    known = sorted(config.stem for config in (root / "configs").glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"profile is {name!r}; use one of {known}, or write configs/{name}.yaml")
    return str(name)


def use_profile(profile: str | None, root: Path = Path()) -> str:
    """Write `profile` into params.yaml, change nothing else there, and return it; None keeps the profile."""
    name = profile_name(profile, root)
    if profile is not None:
        text = (root / "params.yaml").read_text(encoding="utf-8")
        old = (YAML(typ="safe").load(text) or {}).get("profile")
        changed, found = re.subn("^profile:.*$", f"profile: {name}", text, count=1, flags=re.MULTILINE)
        if name != old:
            write_text(root / "params.yaml", changed if found else f"profile: {name}\n{text}")
    return name


def override(overrides: Mapping[str, Any], root: Path = Path()) -> list[str]:
    """Write `overrides` into the files that they name; returns a line for each change.

    A key is FILE:SECTION.KEY, such as configs/tiny.yaml:align.spo.beta or params.yaml:methods; without FILE: it belongs
    to the file of the profile that params.yaml names.
    """
    changes = []
    for key, value in overrides.items():
        file, _, path = key.rpartition(":")
        place = Path(file or f"configs/{profile_name(None, root)}.yaml")
        document = _read(place, root)
        before = _put(document, path.split("."), value, key)
        with (root / place).open("w", encoding="utf-8") as stream:
            _yaml().dump(document, stream)
        changes.append(f"{place}: {path} is {value!r}, was {before!r}")
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
