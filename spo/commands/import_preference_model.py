"""`python -m spo import-preference-model`."""

from pathlib import Path
from typing import Annotated

import typer

from spo.commands.export import require_new
from spo.runtime.libraries import set_up_libraries


def import_preference_model(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    clip: Annotated[str, typer.Option(metavar="REPO", help="CLIP with the model's configuration: name or folder.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", show_default=False)],
    processor: Annotated[
        str | None, typer.Option(metavar="REPO", help="Where the tokenizer is, if not there: name or folder.")
    ] = None,
) -> None:
    """Convert a published preference model (.bin).

    The result is a folder that `train_preference.checkpoint` can name.
    """
    require_new(out)
    set_up_libraries()
    from spo.preference.checkpoint import import_published

    import_published(file, clip, out, processor=processor)
    print(f"{out}: name it as train_preference.checkpoint in a profile")
