"""`python -m spo publish`: a LoRA with its model card, on the Hugging Face hub."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from spo.commands.stage import Profile
from spo.config import load_config
from spo.errors import SpoError, one_line
from spo.runtime import hub
from spo.runtime.libraries import set_up_libraries


def publish(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", show_default=False)],
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="The method of the LoRA (default: the profile's first).")
    ] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="As the hub names it, e.g. apache-2.0.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it (default: only its owner).")] = False,
    profile: Profile = None,
) -> None:
    """Put an evaluated LoRA on the Hugging Face hub.

    Writes what `export --format diffusers` writes, the model card with the results included, to a repository. Log in
    first: hf auth login.
    """
    if not hub.is_name(repository):
        raise typer.BadParameter(f"{repository!r} is no name of a repository; it should be OWNER/NAME")
    config = load_config(profile=profile)
    set_up_libraries()
    from huggingface_hub import HfApi, ModelCard, get_token
    from huggingface_hub.errors import HfHubHTTPError

    from spo.commands.models import write_export

    if not hub.connect():
        raise SpoError("the hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE")
    if get_token() is None:
        raise SpoError("there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "lora"
        write_export(config, "diffusers", folder, method=method, license=license)
        try:
            _validate(ModelCard.load(folder / "README.md"))
            api = HfApi()
            api.create_repo(repository, private=not public, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the LoRA")
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise SpoError(f"{repository} could not be written: {one_line(error)}") from None
    print(f"{commit.repo_url}: {'public' if public else 'private'}")


def _validate(card: Any) -> None:
    try:
        card.validate()
    except ValueError as error:
        raise SpoError(f"the hub refuses the model card: {one_line(error)}") from None
