"""The profile of the pipeline: params.yaml names it, where DVC and the stages read it."""

import re
from pathlib import Path

import yaml

from spo.errors import ConfigError
from spo.runtime.files import write_text

_LINE = re.compile(r"^profile:.*$", flags=re.MULTILINE)


def use_profile(profile: str | None, root: Path = Path()) -> str:
    """Write `profile` into params.yaml, change nothing else there, and return it; None keeps the profile.

    It stays written, so the checkout shows what was run. ConfigError where there is no such profile.
    """
    path = root / "params.yaml"
    if not path.is_file():
        raise ConfigError(f"{path.absolute()} is missing; run from the project's folder")
    text = path.read_text(encoding="utf-8")
    current = (yaml.safe_load(text) or {}).get("profile")
    wanted = profile or current
    known = sorted(config.stem for config in (root / "configs").glob("*.yaml"))
    if wanted not in known:
        raise ConfigError(f"profile is {wanted!r}; use one of {known}, or write configs/{wanted}.yaml")
    if wanted != current:
        line = f"profile: {wanted}"
        write_text(path, _LINE.sub(line, text, count=1) if _LINE.search(text) else f"{line}\n{text}")
    return wanted
