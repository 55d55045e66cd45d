"""How many prompts are longer than the context of a model's text encoders, which cut them without a word."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo.config import ModelConfig
from spo.errors import ModelError
from spo.runtime import hub

TOKENIZERS = {
    "sd15": ("tokenizer",),
    "sdxl": ("tokenizer", "tokenizer_2"),
    "sd3": ("tokenizer", "tokenizer_2", "tokenizer_3"),
    "flux": ("tokenizer", "tokenizer_2"),
}
T5 = {("sd3", "tokenizer_3"): 256, ("flux", "tokenizer_2"): 512}  # tokens that the pipelines give it
AT_ONCE, EXAMPLES = 1000, 3


def cut_prompts(prompts: Sequence[str], config: ModelConfig) -> dict[str, dict[str, Any]]:
    """For each tokenizer its context in tokens, the number of longer prompts, and the first of them.

    ModelError if the model's tokenizers cannot be loaded.
    """
    source = config.config if config.is_single_file else config.path
    if source is None or not (Path(source).is_dir() or hub.is_name(source)):
        raise ModelError(f"{source or config.path} is no folder here with tokenizers")
    from transformers import AutoTokenizer  # slow to import

    found = {}
    for name in TOKENIZERS[config.family]:
        is_t5 = (config.family, name) in T5
        if name == "tokenizer_3" and not (config.t5 and _may_have(source, name)):
            continue
        remedy = "it should be a folder that diffusers' save_pretrained wrote"
        with hub.loading(f"{name} of {source!r}", source, "model.path", remedy, hub.only("tokenizer*")):
            tokenizer = AutoTokenizer.from_pretrained(source, subfolder=name, revision=config.revision)
        context = (config.t5_tokens or T5[config.family, name]) if is_t5 else tokenizer.model_max_length
        longer = longer_than(context, prompts, tokenizer)
        found[name] = {"context": context, "prompts": len(longer), "examples": longer[:EXAMPLES]}
    return found


def _may_have(source: str, name: str) -> bool:
    return not Path(source).is_dir() or (Path(source) / name).is_dir()


def longer_than(context: int, prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """The prompts of more than `context` tokens."""
    found = []
    for start in range(0, len(prompts), AT_ONCE):
        part = list(prompts[start : start + AT_ONCE])
        tokens = tokenizer(part, verbose=False).input_ids
        found += [prompt for prompt, ids in zip(part, tokens, strict=True) if len(ids) > context]
    return found
