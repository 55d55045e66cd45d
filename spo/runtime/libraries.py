"""Settings of the libraries that every command needs."""

import os
import warnings


def set_up_libraries() -> None:
    """Import torch, diffusers and transformers, silence them, and turn slow denormal arithmetic off."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import torch
    import transformers

    torch.set_flush_denormal(True)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
