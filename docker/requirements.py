"""Print requirements of pyproject.toml, one per line. `python requirements.py project s3` prints the project's
dependencies and those of the extra `s3`; `python requirements.py server` prints only those of the extra `server`."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
known = {"project": project["dependencies"], **project["optional-dependencies"]}
if not sys.argv[1:] or set(sys.argv[1:]) - known.keys():
    sys.exit(f"error: got {sys.argv[1:]}; name some of {sorted(known)}")
print("\n".join(requirement for name in sys.argv[1:] for requirement in known[name]))
