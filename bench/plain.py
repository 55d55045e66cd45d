"""One SPO batch as the published code does it (RockeyCoss/SPO), for comparison only; its facts, not its text.

A second UNet in memory as the reference; the adapter beside the weights in sampling, too; the preference model in
float32, its text tower and its adaptive norms computed at every step, for every candidate of a prompt; win and lose
each through policy and reference, four forwards a pair; a whole batch of pairs at a time; the cache emptied between.
Weights, noise, order of pairs and optimiser are those of our own path.
"""

import copy

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
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
        for layer in self.unet.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = True  # peft's own way
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
        policy, settings = self.policy, self.settings
        k, first, branch = settings.candidates, settings.first_step, settings.branch_steps
        grid = [*policy.timesteps.tolist(), 0]
        self.cond = policy.encode(self.prompts).tensors
        rows = torch.arange(len(self.prompts), device=self.device)
        tokens = self._tokens(k)
        kept: list[dict[str, Tensor]] = []
        before = self._noise(-1, 1)  # (b, c, h, w)
        for i in range(first):
            before = sample(self._step(before, grid[i], grid[i + 1]), self._noise(i, 1))
        transition = self._step(before, grid[first], grid[first + 1])
        for i in range(first, len(grid) - 1, branch):
            end = i + branch
            path = [before, self._candidates(transition, i)]  # then (k * b, c, h, w) each
            for j in range(i + 1, end):
                path.append(sample(self._step(path[-1], grid[j], grid[j + 1]), self._noise(j, k)))
            ahead = self._step(path[-1], grid[end], grid[end + 1]) if end < len(grid) - 1 else None
            scores = self._scores(policy.decode(ahead.x_0 if ahead else path[-1]), tokens, grid[end])
            for j in range(branch):
                kept.append(self._pair(path[j], path[j + 1], scores, grid[i + j], grid[i + j + 1]))
            if ahead:
                index = self.noise.choice(i, k) * len(rows) + rows
                before = path[-1][index]
                transition = Transition(ahead.mean[index], ahead.std[index], ahead.x_0[index])
        width = max(part["x_t"].shape[1] for part in kept)
        kept = [{**part, "x_t": part["x_t"].expand(-1, width, -1, -1, -1)} for part in kept]
        return {name: torch.cat([part[name] for part in kept]) for name in kept[0]}

    def update(self, pairs: dict[str, Tensor], index: Tensor) -> float:
        x_t, x_prev, t, t_prev, row = (pairs[name][index] for name in ("x_t", "x_prev", "t", "t_prev", "row"))
        ratios = []
        for which in (0, 1):  # win and lose, each through both networks, though they share x_t
            start = x_t[:, min(which, x_t.shape[1] - 1)]
            log_p = self._log_prob(self.unet, start, x_prev[:, which], t, t_prev, row)
            with torch.no_grad():
                log_p_ref = self._log_prob(self.reference, start, x_prev[:, which], t, t_prev, row)
            clip = self.settings.clip_range
            ratios.append((log_p - log_p_ref).exp().clamp(1 - clip, 1 + clip).log())
        losses = -F.logsigmoid(self.settings.beta * (ratios[0] - ratios[1]))
        (losses.sum() / self.settings.batch_size).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.mean().item()

    def _step(self, x_t: Tensor, t: int, t_prev: int) -> Transition:
        """From x_t, a whole number of batches, at one timestep to the next."""
        rows = torch.arange(len(x_t), device=self.device) % len(self.prompts)
        times = [torch.full((len(x_t),), time, device=self.device) for time in (t, t_prev)]
        return self.policy.transition(self._predict(self.unet, x_t, times[0], rows), x_t, *times)

    def _candidates(self, transition: Transition, i: int) -> Tensor:
        """(k * b, c, h, w), drawn from one transition of b."""
        k = self.settings.candidates
        return sample(transition, self._noise(i, k).unflatten(0, (k, -1))).flatten(0, 1)

    def _noise(self, i: int, k: int) -> Tensor:
        return self.noise.normal(i, (k, *self.policy.latent_shape)).transpose(0, 1).flatten(0, 1)

    def _predict(self, unet: torch.nn.Module, x_t: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """The guided output for the prompts at `row`."""
        policy = self.policy
        cond = Conditioning(self.cond)[row]
        autocast = policy.dtype != torch.float32 and unet is self.unet  # accelerate's: of the policy alone
        with torch.autocast(self.device.type, policy.dtype, enabled=autocast):
            inputs = policy.network._inputs(x_t, cond, True)
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

    def _pair(self, x_t: Tensor, candidates: Tensor, scores: Tensor, t: int, t_prev: int) -> dict[str, Tensor]:
        """Win and lose of one step: x_t (b or k * b, ...), their candidates (k * b, ...), scores (k, b)."""
        row = torch.arange(len(self.prompts), device=self.device)
        win, lose = scores.argmax(0), scores.argmin(0)
        x_prev = candidates.unflatten(0, scores.shape)
        starts = [x_t] if len(x_t) == len(row) else [x_t.unflatten(0, scores.shape)[each, row] for each in (win, lose)]
        full = {"t": t, "t_prev": t_prev}
        times = {name: torch.full((len(row),), value, device=self.device) for name, value in full.items()}
        x_prev = torch.stack([x_prev[win, row], x_prev[lose, row]], dim=1)
        return {"x_t": torch.stack(starts, dim=1), "x_prev": x_prev, "row": row, **times}
