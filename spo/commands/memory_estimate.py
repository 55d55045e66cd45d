"""The memory that the stages of a profile need on a GPU, before anything is loaded.

Bytes are counted from the shapes: the weights of every part and, of those that train, gradients (4 bytes a weight),
AdamW's moments (8, or 2 in 8 bit) and autocast's copies in half precision (2). What a pass keeps is an estimate: the
numbers that its modules put out, times what was measured on one NVIDIA H100 (docs/performance.md):

    4.0 bytes a number if the whole network trains       a step of the pixel model with 16 pairs: 42.6 GB
    2.1 bytes a number if only a LoRA trains             an update of SD v1.5 with 10 pairs: 25.8 GB
    4 times the largest output of a pass without gradients    SD3.5, whose peak is 8 images in the VAE: 16.3 GB

In float32 the first two are 7 and 4, counted from the tensors that torch keeps on a CPU.

Of a sharded network a process has its part, and what is gathered at a time; each loads it whole before it is sharded.
"""

from dataclasses import dataclass
from typing import Any

from spo.commands import architectures as shapes
from spo.commands.disk_estimate import moments
from spo.config import (
    AlignConfig,
    Config,
    D3poConfig,
    DiffusionDpoConfig,
    LatentPreferenceConfig,
    MetricConfig,
    PixelPreferenceConfig,
    SampledConfig,
    SpoConfig,
    StepGrpoConfig,
    TrainPreferenceConfig,
)
from spo.models.autoencoder import images_at_once
from spo.models.network import block_kinds, samples_at_once
from spo.stages.align import BATCH

USABLE = 0.94  # of a GPU's memory; CUDA itself and gaps between tensors take the rest
# by what trains, and whether in half precision
KEPT = {("all", True): 4.0, ("lora", True): 2.1, ("all", False): 7.0, ("lora", False): 4.0}
ALIVE = 4  # of the largest outputs, in a pass without gradients
METRICS = {"hpsv2": 986, "image_reward": 447, "laion_aesthetic": 428}  # millions of weights, in float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a job on one GPU."""

    counted: float  # weights, gradients, moments, copies
    activations: float  # an estimate

    @property
    def total(self) -> float:
        return self.counted + self.activations

    def fits(self, memory: float) -> bool:
        """Whether a GPU with so many bytes has room for it."""
        return self.total <= USABLE * memory


def jobs(config: Config) -> list[str]:
    """The profile's jobs that use a GPU, in running order."""
    trainings = [f"train_preference {name}" for name in config.train_preference]
    return [*trainings, *(f"align {name}" for name in config.methods), "evaluate"]


def estimate(config: Config, job: str) -> MemoryEstimate:
    """The estimate for one of the profile's jobs."""
    stage, _, name = job.partition(" ")
    if stage == "train_preference":
        return _train_preference(config, config.preference_models[name])
    return _align(config, name) if stage == "align" else _evaluate(config)


def _train_preference(config: Config, training: TrainPreferenceConfig) -> MemoryEstimate:
    """One step, or the measurement of a model that is trained already."""
    resting, encoders = base_bytes(config)
    weights, pairs = shapes.preference_weights(config.model, training), at_a_time(config, training)
    painting = _painting(config, 2 * pairs, training)
    if training.is_trained:
        return MemoryEstimate(resting + 4 * weights, max(encoders, painting))
    low = training.dtype != "float32"
    per_weight = 4 + moments(training.eight_bit) + 2 * low
    if isinstance(training, LatentPreferenceConfig):
        kept, before = _kept_by_latent(config, training, pairs), float(encoders)
    else:
        assert isinstance(training, PixelPreferenceConfig)
        kept, before = _kept_by_pixel(config, training, pairs), max(encoders, painting)
    passed: float = max(KEPT["all", low] * kept, before)
    gradients = 4 * weights
    if pairs < _share(config, training.batch_size):  # the last micro-batch has those of the others beside it
        passed += gradients
    counted = resting + weights * per_weight
    return MemoryEstimate(counted + gradients, max(0.0, passed - gradients))


def _kept_by_pixel(config: Config, training: PixelPreferenceConfig, pairs: int) -> int:
    checkpointing = config.model.gradient_checkpointing
    image = shapes.outputs_of_images(training.start_from)
    caption = shapes.outputs_of_caption(shapes.clip_of(training.start_from).text_model)
    return pairs * (2 * image.kept(checkpointing=checkpointing) + caption.kept(checkpointing=checkpointing))


def _kept_by_latent(config: Config, training: LatentPreferenceConfig, pairs: int) -> int:
    model = config.model
    passes = 2 if training.guidance_scale > 1 and not model.is_distilled else 1
    half = shapes.outputs_of_network(model).kept(
        checkpointing=model.gradient_checkpointing, leave_out=shapes.not_in_latent(model, training)
    )
    encoders = [] if model.is_flow else shapes.text_encoders_of(model)  # a flow's are frozen
    captions = [shapes.outputs_of_caption(each).kept(checkpointing=False) for each in encoders]
    return 2 * pairs * passes * half + (pairs + 1) * sum(captions)


def _align(config: Config, name: str) -> MemoryEstimate:
    """The largest of an update, the sampling of a rollout, the watch and the encoding of prompts."""
    method, model = config.align[name], config.model
    resting, encoders = base_bytes(config)
    scorers = {*method.scorers, *([config.scorer_of(name)] if method.watch else [])}
    models = [config.preference_models[each] for each in scorers]
    counted: float = resting + 4 * sum(shapes.preference_weights(model, each) for each in models)
    counted += _metric(method.watch.metric) if method.watch else 0
    network, low = shapes.network_of(model), model.dtype != "float32"
    trained = shapes.weights(network) if method.full_fine_tuning else shapes.lora_weights(network, method.lora)
    start = counted + 4 * trained  # a frozen copy is in `resting`
    counted += trained * (4 + 4 + moments(method.optimizer.eight_bit) + 2 * low)
    if config.launch.shard_network and config.launch.num_processes > 1:
        counted -= _on_other_processes(config, method, trained)
    counted += _examples(config, method) * _example(config)
    guided = 1 if isinstance(method, DiffusionDpoConfig) else _passes(config)
    shared = isinstance(method, SampledConfig) and not isinstance(method, D3poConfig)
    shared &= not isinstance(method, SpoConfig) or method.branch_steps == 1  # win and lose share x_t
    samples = at_a_time(config, method) * guided * (1 if shared else 2)
    kept = samples * shapes.outputs_of_network(model).kept(checkpointing=model.gradient_checkpointing)
    update = KEPT["all" if method.full_fine_tuning else "lora", low] * kept
    sampling = 0.0
    if isinstance(method, SampledConfig):
        images = getattr(method, "candidates", 2) * _share(config, method.prompts_per_rollout)
        sampling = max(_painting(config, images, config.preference_models[each]) for each in method.scorers)
    watched = min(BATCH, config.evaluate.batch_size) if method.watch else 0
    return MemoryEstimate(counted, max(update, sampling, encoders + _pipeline(config, watched), start - counted))


def _on_other_processes(config: Config, method: AlignConfig, trained: int) -> float:
    """Bytes of a sharded network and its training that a process does not have, less those that it gathers at a time.

    Gathered are the weights outside of blocks, a block and the next one. Autocast's copies stay whole, unless gradient
    checkpointing makes them anew for each block.
    """
    network, size, whole = shapes.network_of(config.model), _bytes(config), method.full_fine_tuning
    blocks = [shapes.weights(each) for each in network.modules() if type(each).__name__ in block_kinds(network)]
    gathered = shapes.weights(network) - sum(blocks) + 2 * max(blocks)
    divided = size * shapes.weights(network) + trained * (8 + moments(eight_bit=False))
    if whole and config.model.dtype != "float32" and config.model.gradient_checkpointing:
        divided += 2 * trained
    return divided * (1 - 1 / config.launch.num_processes) - gathered * (4 if whole else size)


def _evaluate(config: Config) -> MemoryEstimate:
    resting, encoders = base_bytes(config)
    counted = resting + encoders + sum(map(_metric, config.evaluate.metrics))
    return MemoryEstimate(counted, _pipeline(config, config.evaluate.batch_size))


def base_bytes(config: Config) -> tuple[int, int]:
    """Bytes of the pipeline's weights that are always on the GPU, and of those that are there to encode prompts."""
    model, size = config.model, _bytes(config)
    encoders = size * shapes.weights(*shapes.text_encoders_of(model))
    vae = shapes.part_of(model, "vae")
    resting = size * shapes.weights(shapes.network_of(model), vae)
    if shapes.upcasts_vae(model):
        resting += 4 * shapes.weights(vae)  # a copy in float32, beside the pipeline's own
    return (resting, encoders) if model.offload_text_encoders else (resting + encoders, 0)


def _painting(config: Config, images: int, scorer: TrainPreferenceConfig) -> float:
    """Bytes of a pass without gradients through the network and, for a pixel model, of decoding and scoring images."""
    model, size = config.model, _bytes(config)
    _, height, width = shapes.latent_size(model)
    samples = min(_passes(config) * images, samples_at_once(height, width))
    network = ALIVE * size * samples * shapes.outputs_of_network(model).largest
    if not scorer.reads_x_0:
        return network
    pixels = model.size[0] * model.size[1]
    at_once = min(images_at_once(*model.size, on_cpu=False), images)
    decoding = ALIVE * _bytes_in_vae(config) * at_once * shapes.outputs_of_decoder(model).largest
    start_from = scorer.start_from if isinstance(scorer, PixelPreferenceConfig) else None
    scoring = ALIVE * 4 * images * shapes.outputs_of_images(start_from).largest
    return max(network, decoding, scoring) + 12 * 3 * images * pixels  # the images, and copies of them


def _pipeline(config: Config, images: int) -> float:
    """Bytes of the pass of diffusers' pipeline, which takes all images at once."""
    network = _bytes(config) * _passes(config) * shapes.outputs_of_network(config.model).largest
    decoder = _bytes_in_vae(config) * shapes.outputs_of_decoder(config.model).largest
    return ALIVE * images * max(network, decoder)


def _examples(config: Config, method: AlignConfig) -> int:
    """Examples of a round, which are on the GPU together."""
    if not isinstance(method, SampledConfig):
        return method.batch_size
    if isinstance(method, SpoConfig | StepGrpoConfig):  # an example is one noisy latent with its candidates
        per_prompt = config.sampling.steps - method.first_step
    else:
        per_prompt = config.sampling.steps * getattr(method, "candidates", 2)
    return _share(config, method.prompts_per_rollout) * per_prompt


def _example(config: Config) -> int:
    """Bytes of an example: the embeddings of its prompt, and three latents in float32."""
    settings: Any = shapes.network_of(config.model).config
    width = settings.joint_attention_dim if config.model.is_flow else settings.cross_attention_dim
    channels, height, width_ = shapes.latent_size(config.model)
    embeddings = _passes(config) * _bytes(config) * shapes.num_tokens(config.model) * width
    return embeddings + 3 * 4 * channels * height * width_


def _metric(metric: MetricConfig) -> int:
    """Bytes of a metric's model, in float32."""
    if metric.kind == "clip":
        return 4 * shapes.weights(shapes.clip_of(metric.model))
    return 4 * 10**6 * METRICS.get(metric.kind, 0)


def _passes(config: Config) -> int:
    return 2 if config.counted_sampling.guidance_scale > 1 else 1


def _bytes(config: Config) -> int:
    """Of a number in the pipeline's dtype."""
    return 4 if config.model.dtype == "float32" else 2


def _bytes_in_vae(config: Config) -> int:
    """Of a number in the autoencoder."""
    return 4 if shapes.upcasts_vae(config.model) else _bytes(config)


def _share(config: Config, count: int) -> int:
    """What one process has of `count` prompts or pairs."""
    return -(-count // config.launch.num_processes)


def at_a_time(config: Config, settings: AlignConfig | TrainPreferenceConfig) -> int:
    """Pairs in memory at a time, of one process."""
    share = _share(config, settings.batch_size)
    return min(settings.micro_batch_size or share, share)
