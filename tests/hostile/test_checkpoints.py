"""Whatever a published preference checkpoint holds, reading it gives a model or one line, and runs nothing."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from spo.errors import ModelError
from spo.preference.checkpoint import published_name, read_published
from spo.preference.pixel import StepAwareCLIP
from tests.hostile.trying import assert_one_line, damaged, tries

Published = tuple[CLIPConfig, dict[str, Tensor]]


@pytest.fixture(scope="module")
def published() -> Published:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 20, "max_position_embeddings": 6, "bos_token_id": 18, "eos_token_id": 19}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=4)
    model = StepAwareCLIP.from_clip(CLIPModel(config))
    return config, {published_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def assert_reads_or_explains(folder: Path, data: bytes, config: CLIPConfig) -> bool:
    (folder / "published.bin").write_bytes(data)
    try:
        model = read_published(folder / "published.bin", config)
    except ModelError as error:
        assert_one_line(error)
        return False
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return True


ENTRIES = st.one_of(
    st.lists(st.integers(0, 3), max_size=4).map(lambda shape: torch.zeros(shape)),
    st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.float64, torch.bfloat16]).map(
        lambda kind: torch.ones(4, dtype=kind)
    ),
    st.just(torch.full((4,), float("nan"))),
    st.just(torch.zeros(2, 2).to_sparse()),
    st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3),
)


@tries(80)
@given(data=st.data(), what=st.sampled_from(["drop", "add", "change", "retype", "poison"]))
def test_an_entry_that_is_missing_extra_mis_shaped_mistyped_or_not_finite(
    tmp_path_factory: pytest.TempPathFactory, published: Published, data: st.DataObject, what: str
) -> None:
    config, state = published
    state = dict(state)
    name = data.draw(st.sampled_from(sorted(state)))
    match what:
        case "drop":
            del state[name]
        case "add":
            state[data.draw(st.text(max_size=20) | st.integers() | st.none())] = data.draw(ENTRIES)  # type: ignore[index]
        case "change":
            state[name] = data.draw(ENTRIES)
        case "retype":
            state[name] = state[name].to(data.draw(st.sampled_from([torch.int32, torch.complex64, torch.bool])))
        case "poison":
            state[name] = state[name] * float("nan")
    folder = tmp_path_factory.getbasetemp()
    read = assert_reads_or_explains(folder, saved(state), config)
    assert not read or what == "change"  # which may have hit on the right shape


@tries(80)
@given(data=st.data())
def test_a_damaged_file(tmp_path_factory: pytest.TempPathFactory, published: Published, data: st.DataObject) -> None:
    config, state = published
    assert_reads_or_explains(tmp_path_factory.getbasetemp(), data.draw(damaged(st.just(saved(state)))), config)


class Call:
    """Unpickled, it calls what it was made with."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda path: Call(os.mkdir, path),
        lambda path: Call(os.system, f"mkdir {path}"),
        lambda path: Call(eval, f"__import__('os').mkdir({path!r})"),
        lambda path: Call(getattr, Call(__import__, "os"), "mkdir"),
        lambda path: Call(torch.load, path),
        lambda path: Call(exec, f"open({path!r}, 'w')"),
    ],
)
def test_a_payload_is_refused_and_not_run(
    published: Published, tmp_path: Path, call: Any, zipped: bool, protocol: int
) -> None:
    config, state = published
    hostile = {**state, "model.logit_scale": call(str(tmp_path / "made"))}
    buffer = io.BytesIO()
    if zipped:
        torch.save(hostile, buffer, pickle_protocol=max(2, protocol))
    else:
        pickle.dump({"model.logit_scale": hostile["model.logit_scale"]}, buffer, protocol=protocol)
    assert not assert_reads_or_explains(tmp_path, buffer.getvalue(), config)
    assert not (tmp_path / "made").exists()
