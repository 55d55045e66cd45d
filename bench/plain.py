"""One SPO batch as the published code does it (RockeyCoss/SPO), for comparison only; its facts, not its text.

A second UNet in memory as the reference; the adapter beside the weights in sampling, too; the preference model in
float32, its text tower and its adaptive norms computed at every step, for every candidate of a prompt; win and lose
each through policy and reference, four forwards a pair; a whole batch of pairs at a time; the cache emptied between.
Weights, noise, order of pairs and optimiser are those of our own path.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bench.systems import System, attach_lora
from spo.core.gaussian import log_prob, sample
from spo.core.noise import KeyedNoise, epoch_seed
from spo.core.types import Conditioning, Transition


class PlainPath:
    """The batch of a system; attaches the system's LoRA."""

    def __init__(self, system: System, *, seed: int):
        self.settings, self.policy, self.preference = system.settings, system.policy, system.preference
        self.reference = copy.deepcopy(system.policy.network.module)
        attach_lora(system)
        self.unet = system.policy.network.module
        self.device = system.policy.device
        self.clip = system.preference.model.to(self.device).eval()
        order = torch.randperm(len(system.prompts), generator=Generator().manual_seed(epoch_seed(seed, 0))).tolist()
        self.prompts = [system.prompts[i] for i in order]
        self.noise = KeyedNoise(seed, 0, order, self.device)
        self.seed = seed
        settings = self.settings.optimizer
        self.optimizer = torch.optim.AdamW(
            self.policy.network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def run(self) -> tuple[dict[str, Tensor], list[float]]:
        """Sample, score and train on one batch: its pairs (x_t, x_prev, t, t_prev) and each update's loss."""
        pairs = self.sample()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        order = torch.randperm(len(pairs["t"]), generator=Generator().manual_seed(self.seed + 7919))
        return pairs, [self.update(pairs, index) for index in order.split(self.settings.batch_size)]

    @torch.no_grad()
    def sample(self) -> dict[str, Tensor]:
        policy, k, first = self.policy, self.settings.candidates, self.settings.first_step
        grid = [*policy.timesteps.tolist(), 0]
        self.cond = policy.encode(self.prompts).tensors
        rows = torch.arange(len(self.prompts), device=self.device)
        tokens = self._tokens(k)
        kept: list[dict[str, Tensor]] = []
        x_t = self._noise(-1, 1)  # (k * b, c, h, w)
        before, candidates = x_t, x_t
        for i in range(len(grid) - 1):
            wide = rows.repeat(len(x_t) // len(rows))
            t, t_prev = (torch.full((len(x_t),), grid[j], device=self.device) for j in (i, i + 1))
            transition = policy.transition(self._predict(self.unet, x_t, t, wide), x_t, t, t_prev)
            if i > first:
                scores = self._scores(policy.decode(transition.x_0), tokens, grid[i])
                kept.append(self._pair(before, candidates, scores, grid[i - 1], grid[i]))
                index = self.noise.choice(i - 1, k) * len(rows) + rows
                before = candidates[index]
                transition = Transition(transition.mean[index], transition.std[index], transition.x_0[index])
            elif i == first:
                before = x_t
            width = k if i >= first else 1
            noise = self._noise(i, width).unflatten(0, (width, -1))
            x_t = candidates = sample(transition, noise).flatten(0, 1)
        scores = self._scores(policy.decode(candidates), tokens, 0)
        kept.append(self._pair(before, candidates, scores, grid[-2], 0))
        return {name: torch.cat([part[name] for part in kept]) for name in kept[0]}

    def update(self, pairs: dict[str, Tensor], index: Tensor) -> float:
        x_t, x_prev, t, t_prev, row = (pairs[name][index] for name in ("x_t", "x_prev", "t", "t_prev", "row"))
        ratios = []
        for which in (0, 1):  # win and lose, each through both networks, though they share x_t
            log_p = self._log_prob(self.unet, x_t, x_prev[:, which], t, t_prev, row)
            with torch.no_grad():
                log_p_ref = self._log_prob(self.reference, x_t, x_prev[:, which], t, t_prev, row)
            clip = self.settings.clip_range
            ratios.append((log_p - log_p_ref).exp().clamp(1 - clip, 1 + clip).log())
        losses = -F.logsigmoid(self.settings.beta * (ratios[0] - ratios[1]))
        (losses.sum() / self.settings.batch_size).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.mean().item()

    def _noise(self, i: int, k: int) -> Tensor:
        return self.noise.normal(i, (k, *self.policy.latent_shape)).transpose(0, 1).flatten(0, 1)

    def _predict(self, unet: torch.nn.Module, x_t: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """The guided output for the prompts at `row`."""
        policy = self.policy
        cond = Conditioning(self.cond)[row]
        with torch.autocast(self.device.type, policy.dtype, enabled=policy.dtype != torch.float32):
            inputs = policy.network._inputs(cond, True)
            output = unet(x_t.repeat(2, 1, 1, 1).to(policy.dtype), t.repeat(2), **inputs).sample.float()
        negative, positive = output.chunk(2)
        return negative + policy.sampler.guidance_scale * (positive - negative)

    def _log_prob(
        self, unet: torch.nn.Module, x_t: Tensor, x_prev: Tensor, t: Tensor, t_prev: Tensor, row: Tensor
    ) -> Tensor:
        return log_prob(self.policy.transition(self._predict(unet, x_t, t, row), x_t, t, t_prev), x_prev)

    def _tokens(self, k: int) -> Tensor:
        tokenizer, length = self.preference.tokenizer, self.clip.clip.text_model.config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return tokenizer(self.prompts, **options).input_ids.repeat(k, 1).to(self.device)

    def _scores(self, images: Tensor, tokens: Tensor, t: int) -> Tensor:
        """(k, b)"""
        each = self.clip.modulations(torch.full((len(images),), t, device=self.device))
        features = self.clip.modulated_features(self.preference.preprocess(images), each)
        return self.clip.score(features, self.clip.text_features(tokens)).unflatten(0, (-1, len(self.prompts)))

    def _pair(self, before: Tensor, candidates: Tensor, scores: Tensor, t: int, t_prev: int) -> dict[str, Tensor]:
        row = torch.arange(len(before), device=self.device)
        x_prev = candidates.unflatten(0, scores.shape)
        win, lose = x_prev[scores.argmax(0), row], x_prev[scores.argmin(0), row]
        full = {"t": t, "t_prev": t_prev}
        times = {name: torch.full((len(row),), value, device=self.device) for name, value in full.items()}
        return {"x_t": before, "x_prev": torch.stack([win, lose], dim=1), "row": row, **times}
