"""Measure how often faster ways to score candidates choose the same win and lose.

    python -m experiments.agreement --size tiny                                   # the embedded default
    python -m experiments.agreement --size sd15 --tiny-vae madebyollin/taesd      # needs a GPU

All ways score the same candidates, because draws never depend on scores. The agreement of the tiny autoencoder is
meaningful only if both autoencoders are trained; it is measured only with --tiny-vae.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench.markdown import table
from bench.measure import RESULTS, clock, machine, save
from bench.systems import FULL_SIZE, SHAPES, System, attach_lora, make_system
from spo.core.types import Pairs
from spo.methods.spo import Spo
from spo.models.load import load_tiny_vae
from spo.preference.score import PreferenceScorer
from spo.runtime.libraries import set_up_libraries


def rollout_pairs(system: System, dtype: torch.dtype) -> Pairs:
    """The pairs of one batch, all kept, scored in a dtype."""
    policy = system.policy
    scorer = PreferenceScorer(system.preference, device=policy.device, dtype=dtype)
    settings = system.settings.model_copy(update={"threshold": 0.0})
    pairs = next(Spo(settings, policy, scorer, system.prompts, seed=0).collect(0)).examples
    assert isinstance(pairs, Pairs)
    return pairs


def agreement(size: str, *, prompts: int | None, tiny_vae: str | None) -> dict[str, Any]:
    """Shares of the float32 pairs, and of their wins and loses, that each way also chooses."""
    device = torch.device("cuda" if size in FULL_SIZE else "cpu")
    system = make_system(size, device, prompts=prompts)
    attach_lora(system)
    ways: dict[str, tuple[torch.dtype, str | None]] = {"bfloat16 preference model": (torch.bfloat16, None)}
    if tiny_vae is not None:
        ways["tiny autoencoder"] = (torch.float32, tiny_vae)
    start = clock(device)
    exact = rollout_pairs(system, torch.float32)
    result: dict[str, Any] = {"size": size, "machine": machine(device), "pairs": len(exact)}
    result["seconds"] = clock(device) - start
    for name, (dtype, path) in ways.items():
        if path is not None:
            system.policy.autoencoder.preview = load_tiny_vae(path, system.policy)
        start = clock(device)
        pairs = rollout_pairs(system, dtype)
        same = (pairs.x_prev - exact.x_prev).abs().amax(dim=(2, 3, 4)) < 1e-3  # (n, 2)
        result[name] = {
            "pairs": same.all(dim=1).float().mean().item(),
            "wins": same[:, 0].float().mean().item(),
            "loses": same[:, 1].float().mean().item(),
            "clear_pairs": same.all(dim=1)[exact.margin > 0.2].float().mean().item(),
            "seconds": clock(device) - start,
        }
    return result


def show(result: dict[str, Any]) -> str:
    rows = [["", "same pair", "same win", "same lose", "same pair, margin above .2"]]
    for name, row in result.items():
        if isinstance(row, dict):
            rows.append([name, *(f"{row[key]:.1%}" for key in ("pairs", "wins", "loses", "clear_pairs"))])
    return f"{result['size']}: {result['pairs']} pairs; {result['machine']}\n\n{table(rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "tiny"], default="tiny")
    parser.add_argument("--prompts", type=int, help="of the batch (default: the size's own)")
    parser.add_argument("--tiny-vae", help="an AutoencoderTiny for these latents: hub name or folder")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    options = parser.parse_args()
    set_up_libraries()
    result = agreement(options.size, prompts=options.prompts, tiny_vae=options.tiny_vae)
    print(show(result))
    save(options.out or RESULTS / f"agreement-{options.size}.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
