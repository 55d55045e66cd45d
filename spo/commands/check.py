"""`python -m spo check`."""

from pathlib import Path
from typing import Annotated

import typer

from spo.commands.options import Profile
from spo.commands.preflight import Finding
from spo.config import load_config
from spo.runtime.libraries import set_up_libraries


def check(
    profile: Profile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Look only at settings, files and disk; run nothing.")] = False,
) -> int:
    """Find what would end a run after hours.

    Looks at settings, files and disk, then runs all stages in miniature.
    """
    config = load_config(Path(), profile)
    _show(Finding("configuration", True, f"configs/{config.profile}.yaml and params.yaml", ()))
    set_up_libraries()
    from spo.commands.miniature import check_all

    good = check_all(config, Path(), _show, quick=quick)
    print(f"profile {config.profile} {'can run' if good else 'cannot run yet: repair the lines marked FAIL'}")
    return 0 if good else 1


def _show(finding: Finding) -> None:
    print(f"{'ok  ' if finding.good else 'FAIL'}  {finding.what:<34} {finding.detail}", flush=True)
