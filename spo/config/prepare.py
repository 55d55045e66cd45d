"""Prompts and preference pairs."""

from typing import Annotated

from pydantic import Field

from spo.config.base import Positive, Section


class PromptsConfig(Section):
    source: str  # a .txt, .json, .jsonl, .csv, .tsv or .parquet file
    field: str | None = None  # of the prompt, where rows have fields
    max_prompts: Positive | None = None


class PreferencesConfig(Section):
    source: str  # a folder or file of JSON Lines or parquet, or hub:NAME
    split: str = "train"  # of a hub data set
    max_pairs: Positive | None = None


class PrepareConfig(Section):
    prompts: PromptsConfig
    preferences: PreferencesConfig | None = None  # None: no pairs, for a preference model that is trained already
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
