"""The parts that the embedded default is made of; each learns something in a few steps."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Generator

from spo.data.preferences import PreferencePair, read_preferences
from spo.world.opinion import ALIGNED_AND_CENTRED, Opinion, combine, subject
from spo.world.pretraining.calibration import agreement
from spo.world.pretraining.clip import (
    CONTEXT,
    new_clip,
    new_tokenizer,
    save_clip,
    text_encoder_of,
    token_ids,
    train_clip,
)
from spo.world.pretraining.denoiser import Average, new_unet, train_denoiser
from spo.world.pretraining.flow import Frozen, encode, new_transformer, save_flow, train_flow
from spo.world.pretraining.pairs import (
    Pool,
    compare,
    compare_all,
    recognisable,
    to_jpeg,
    write_comparisons,
    write_pairs,
)
from spo.world.pretraining.preference import (
    draw_stock,
    drawn_groups,
    generated_groups,
    learn_labels,
    score_groups,
    train_preference,
    train_sight,
)
from spo.world.pretraining.recipe import RECIPE
from spo.world.pretraining.vae import calibrate, draw_batch, finish_vae, new_vae, train_vae
from spo.world.scenes import SIZES, Scene, all_scenes, draw_attributes, draw_quality, render


def fixed(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = new_vae(channels=(8, 16, 32, 64), latent_channels=8)
    calibrate(made, fixed())
    return made


@torch.no_grad()
def test_the_autoencoder_starts_with_block_means(vae):
    pictures = draw_batch(16, fixed(1))
    means = F.interpolate(F.avg_pool2d(pictures, 8), scale_factor=8)
    decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    assert (decoded - pictures).abs().mean() < 2 * (means - pictures).abs().mean()


def test_finishing_the_autoencoder_scales_its_latents_and_changes_no_picture(vae):
    pictures = draw_batch(16, fixed(1))
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        finish_vae(vae, fixed(2))
        latents = vae.encode(draw_batch(256, fixed(2))).latent_dist.mean
        after = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)


def test_the_autoencoder_learns():
    vae = new_vae(channels=(8, 16, 32, 64), latent_channels=8)
    pictures = draw_batch(16, fixed(1))

    @torch.no_grad()
    def error() -> float:
        return F.l1_loss(vae.decode(vae.encode(pictures).latent_dist.mean).sample, pictures).item()

    calibrate(vae, fixed())
    before = error()
    steps = list(train_vae(vae, replace(RECIPE, vae_steps=40, vae_batch=8, vae_rate=3e-3), fixed()))
    assert len(steps) == 40
    assert error() < before


def test_prompts_fit_the_context_and_differ():
    tokenizer = new_tokenizer()
    prompts = [scene.prompt for scene in all_scenes()]
    assert max(len(tokenizer(prompt).input_ids) for prompt in prompts) <= CONTEXT
    assert len(token_ids(tokenizer, prompts).unique(dim=0)) == len(prompts)


def test_the_text_encoder_is_the_clips_text_tower():
    tokenizer = new_tokenizer()
    clip = new_clip(tokenizer)
    ids = token_ids(tokenizer, ["a small red cross on a white background", "an orange circle"])
    expected = clip.text_model(ids).last_hidden_state
    torch.testing.assert_close(text_encoder_of(clip)(ids).last_hidden_state, expected)


def test_the_clip_learns_which_prompt_belongs_to_which_picture():
    tokenizer = new_tokenizer()
    recipe = replace(RECIPE, clip_steps=60, clip_batch=32, clip_rate=2e-3)
    steps = train_clip(new_clip(tokenizer), tokenizer, recipe, fixed())
    losses = [step["loss"] for step in steps]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_captions_and_flaws_are_learned_together(vae):
    tokenizer, scenes = new_tokenizer(), all_scenes()[:8]
    stock = draw_stock(vae, scenes, 64, fixed(), batch_size=32)
    torch.testing.assert_close(stock.flaws.std(dim=0), torch.ones(4))
    recipe = replace(RECIPE, sight_steps=60, sight_batch=32, sight_rate=2e-3)
    steps = list(train_sight(new_clip(tokenizer, width=32, layers=1), tokenizer, stock, scenes, recipe, fixed()))
    for name in ("captions", "unexplained"):
        assert sum(step[name] for step in steps[-10:]) < 0.95 * sum(step[name] for step in steps[:10])


def test_the_denoiser_learns_and_ends_with_its_average():
    tokenizer = new_tokenizer()
    unet, text_encoder = new_unet(4), text_encoder_of(new_clip(tokenizer))
    latents = torch.randn(32, 4, 8, 8, generator=fixed())
    scene_index = torch.randint(len(all_scenes()), (32,), generator=fixed())
    steps = train_denoiser(
        unet,
        text_encoder,
        tokenizer,
        latents,
        scene_index,
        steps=60,
        batch_size=16,
        learning_rate=2e-3,
        generator=fixed(),
    )
    losses = [next(steps)["loss"] for _ in range(60)]
    live = [next(module.parameters()).clone() for module in (unet, text_encoder)]
    assert next(steps, None) is None
    assert sum(losses[-20:]) < sum(losses[:20])
    for module, before in zip((unet, text_encoder), live, strict=True):
        assert not torch.equal(next(module.parameters()), before)


def test_the_flow_model_learns_and_ends_with_its_average():
    scenes = len(all_scenes())
    prompts = (torch.randn(scenes + 1, 17, 128, generator=fixed()), torch.randn(scenes + 1, 128, generator=fixed()))
    latents = torch.randn(32, 8, 1, 1, generator=fixed()).expand(-1, -1, 8, 8)
    scene_index = torch.randint(scenes, (32,), generator=fixed())
    transformer = new_transformer(8)
    steps = train_flow(
        transformer, prompts, latents, scene_index, steps=60, batch_size=16, learning_rate=4e-3, generator=fixed()
    )
    losses = [next(steps)["loss"] for _ in range(60)]
    live = transformer.proj_out.weight.clone()
    assert next(steps, None) is None
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert not torch.equal(transformer.proj_out.weight, live)


def test_the_saved_flow_pipeline_reads_prompts_as_its_training_did(vae, tmp_path):
    clip, tokenizer = new_clip(new_tokenizer()), new_tokenizer()
    save_clip(clip, tokenizer, tmp_path / "clip")
    text_encoder_of(clip).save_pretrained(tmp_path / "base" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "base" / "tokenizer")
    vae.save_pretrained(tmp_path / "base" / "vae")
    frozen = Frozen.load(tmp_path / "base", tmp_path / "clip")
    save_flow(frozen, new_transformer(8), tmp_path / "flow")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "flow", text_encoder_3=None, tokenizer_3=None)
    prompts = [all_scenes()[0].prompt, all_scenes()[-1].prompt, ""]
    seen, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    expected = encode(frozen.text_encoders, frozen.tokenizer)
    torch.testing.assert_close(seen, expected[0][[0, -2, -1]])
    torch.testing.assert_close(pooled, expected[1][[0, -2, -1]])


def test_an_average_of_constant_weights_is_those_weights():
    layer = torch.nn.Linear(2, 2)
    average = Average(layer, decay=0.9)
    for step in range(5):
        average.update(step)
    torch.testing.assert_close(average.modules[0].weight, layer.weight)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_is_the_part_of_the_utilitys_variance_that_finish_has(share):
    finish, alignment, layout = torch.randn(3, 20_000, generator=fixed())
    utility = combine(finish, {"alignment": alignment, "layout": layout}, ALIGNED_AND_CENTRED, share=share)
    correlation = torch.corrcoef(torch.stack([utility, finish]))[0, 1]
    assert correlation**2 == pytest.approx(share, abs=0.02)


def test_labels_follow_utility_with_errors_and_ties():
    high, low = torch.ones(5000), torch.zeros(5000)
    labels = Opinion(0.25, temperature=0.5, tie=0.1).label(high, low, fixed())
    assert set(labels.tolist()) == {0.0, 0.5, 1.0}
    decided = labels[labels != 0.5]
    assert 0.8 < decided.mean() < 0.95
    sure = Opinion(0.25, temperature=1e-6, tie=0.1)
    assert (sure.label(high, low, fixed()) == 1).all()
    assert (sure.label(low, low, fixed()) == 0.5).all()


def make_pool() -> Pool:
    prompts = [scene.prompt for scene in all_scenes()[:3]]
    index = torch.arange(3).repeat_interleave(4)
    pictures = draw_batch(12, fixed()) / 2 + 0.5
    return compare(pictures, index, prompts, Opinion(share=0.25, temperature=0.3, tie=0.1), fixed())


def test_every_picture_meets_two_others_of_its_prompt():
    pool = make_pool()
    assert sorted(pool.first.tolist()) == sorted(pool.second.tolist()) == list(range(12))
    assert all(
        pool.prompts[i] == pool.prompts[j] and i != j
        for i, j in zip(pool.first.tolist(), pool.second.tolist(), strict=True)
    )


def test_written_pairs_are_read_by_the_users_importer(tmp_path):
    pool = make_pool()
    write_pairs(pool, tmp_path / "pairs.parquet", fixed())
    pairs = list(read_preferences(str(tmp_path / "pairs.parquet")))
    assert all(isinstance(pair, PreferencePair) for pair in pairs)
    assert len(pairs) == 12
    assert sorted(pair.label_0 for pair in pairs) == sorted(pool.label.tolist())


def test_the_weights_of_content_are_parts_of_the_utilitys_variance():
    finish, alignment, subject_ = torch.randn(3, 20_000, generator=fixed())
    weights = {"alignment": 0.7, "subject": 0.3}
    utility = combine(finish, {"alignment": alignment, "subject": subject_}, weights, share=0.2)
    for term, part in ((finish, 0.2), (alignment, 0.8 * 0.7), (subject_, 0.8 * 0.3)):
        assert torch.corrcoef(torch.stack([utility, term]))[0, 1] ** 2 == pytest.approx(part, abs=0.02)


def test_a_subject_is_a_large_object_on_a_light_background():
    scenes = [
        Scene.parse(f"a {size} red circle on a {back} background") for size in SIZES for back in ("black", "white")
    ]
    pictures = render(draw_attributes(scenes, fixed()), draw_quality(4, fixed(), flaw=0.2), fixed())
    small_dark, small_light, large_dark, large_light = subject(pictures).tolist()
    assert large_light > max(small_light, large_dark) and small_dark < min(small_light, large_dark)


def make_people_pool(per_prompt: int = 4) -> Pool:
    prompts = [scene.prompt for scene in all_scenes()[:3]]
    index = torch.arange(3 * per_prompt) % 3
    drawn = draw_attributes([Scene.parse(prompts[i]) for i in index.tolist()], fixed())
    pictures = render(drawn, draw_quality(len(drawn), fixed()), fixed())
    return compare_all(pictures, index, prompts, RECIPE.people, fixed())


def test_all_pairs_of_a_prompt_are_compared_once_in_either_order():
    pool = make_people_pool()
    both = torch.stack([pool.first, pool.second], dim=1)
    assert len(both.sort(dim=1).values.unique(dim=0)) == len(both) == 3 * 6
    assert all(pool.prompts[i] == pool.prompts[j] for i, j in both.tolist())
    assert 0 < (pool.first < pool.second).sum() < len(both)


def test_some_prompts_of_a_pool_keep_their_pictures_and_labels():
    pool = make_people_pool()
    name = pool.prompts[4]
    part = pool.of({name})
    assert set(part.prompts) == {name} and len(part.pictures) == 4 and len(part.label) == 6
    rows = [i for i, prompt in enumerate(pool.prompts) if prompt == name]
    kept = [k for k, i in enumerate(pool.first.tolist()) if i in rows]
    assert torch.equal(part.pictures[part.first], pool.pictures[pool.first[kept]])
    assert torch.equal(part.pictures[part.second], pool.pictures[pool.second[kept]])
    assert torch.equal(part.label, pool.label[kept])


def test_comparisons_are_read_by_the_users_importer_with_their_own_pictures(tmp_path):
    pool = make_people_pool()
    write_comparisons(pool, tmp_path / "pairs.parquet")
    pairs = list(read_preferences(str(tmp_path / "pairs.parquet")))
    assert len({image for pair in pairs for image in (pair.image_0, pair.image_1)}) == len(pool.pictures)
    expected = sorted(
        (pool.prompts[i], to_jpeg(pool.pictures[i]), to_jpeg(pool.pictures[j]), label)
        for i, j, label in zip(pool.first.tolist(), pool.second.tolist(), pool.label.tolist(), strict=True)
    )
    assert sorted((pair.caption, pair.image_0, pair.image_1, pair.label_0) for pair in pairs) == expected


def test_a_picture_of_nothing_is_not_recognisable():
    scores = {"vivid": 0.5, "crisp": 0.5, "clean": 0.5, "centred": 0.5}
    seen = {name: torch.full((2,), value) for name, value in scores.items()}
    assert recognisable({**seen, "aesthetic": torch.tensor([0.4, 0.2])}).tolist() == [True, False]


def test_labels_without_noise_agree_with_their_opinion_alone():
    pool = make_people_pool(8)
    sure = replace(RECIPE.people, temperature=1e-9, tie=0.0)
    utility = sure.utility(pool.pictures, pool.prompts)
    pool = replace(pool, label=sure.label(utility[pool.first], utility[pool.second], fixed()))
    found = agreement(pool, sure)
    assert found["opinion"] == 1 and found["ties"] == 0
    assert 0 < found["aesthetic"] < 1 and 0 < found["alignment"] < 1


def test_the_preference_model_learns_the_labels_of_a_pool():
    pool = make_people_pool(6)
    dark_wins = pool.pictures.mean(dim=(1, 2, 3))
    pool = replace(pool, label=(dark_wins[pool.first] < dark_wins[pool.second]).float())
    tokenizer = new_tokenizer()
    clip = new_clip(tokenizer)
    recipe = replace(RECIPE, label_steps=60, label_rate=1e-3, preference_prompts=2)
    steps = list(learn_labels(clip, tokenizer, pool, recipe, fixed()))
    assert sum(step["accuracy"] for step in steps[-10:]) > 8 > sum(step["accuracy"] for step in steps[:10])


def test_the_preference_model_learns_an_opinion_from_both_sources(vae):
    tokenizer = new_tokenizer()
    clip = new_clip(tokenizer)
    scenes = all_scenes()[:8]
    pictures, utility = draw_batch(16, fixed()) / 2 + 0.5, torch.linspace(-2, 2, 16)
    members = [torch.arange(8), torch.arange(8, 16)]
    prompts = [scene.prompt for scene in scenes[:2]]
    sources = [
        generated_groups((pictures * 255).byte(), members, prompts, utility, 2),
        drawn_groups(vae, scenes, 2, 0.25),
    ]
    recipe = replace(RECIPE, preference_steps=60, preference_rate=1e-3)
    steps = list(train_preference(clip, tokenizer, sources, Opinion(0.25, 0.05, 0.0), recipe, fixed()))
    assert all(set(step) == {"loss", "accuracy"} for step in steps)
    scores = score_groups(clip.eval(), tokenizer, pictures, prompts)
    assert scores.shape == (2, 8)
    ranks = torch.corrcoef(torch.stack([scores[0], utility[:8]]))[0, 1]
    assert ranks > 0.5
