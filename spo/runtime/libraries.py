"""Settings of the libraries that every command needs."""

import os
import warnings


def set_up_libraries() -> None:
    """Import torch, diffusers and transformers, silence them, and set what arithmetic they use.

    Denormal numbers count as zero, because they are slow. On a GPU, float32 products use TF32, as in the published
    code, and attention does not use cuDNN, whose backward pass fails for FLUX (docs/performance.md).
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import torch
    import transformers

    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
