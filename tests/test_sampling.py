"""Sampling: image i depends on prompt i and seed i alone."""

import diffusers
import pytest
import torch
from conftest import random_edit
from diffusers import StableDiffusionPipeline

from helpers import Edit, load_world, sample, sampling
from helpers.attention import find_tokens
from helpers.denoise import SAMPLERS, Sampling
from helpers.diffusion import to_images
from helpers.sampling import initial_noise, sample_each
from helpers.worlds import EMOJI

PROMPTS = ["church", "Twemoji", "a dog in the style of OpenMoji", "santa claus", "a banana"]
SEEDS = [3, 1, 4, 1, 5]
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2}
THEIRS = {  # plain diffusers' own schedulers, as its users set them up
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {**DPM, "use_lu_lambdas": True}),
    "dpm++ karras": (diffusers.DPMSolverMultistepScheduler, {**DPM, "use_karras_sigmas": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


def images_of(world, prompts=PROMPTS, seeds=SEEDS, edit=None, **options):
    return sample(world, prompts, seeds, edit, **{"steps": 3, "progress": False, **options})


def scheduler_of(sampler):
    """Diffusers' scheduler from the committed folder, without ours."""
    kind, options = THEIRS[sampler]
    return kind.from_pretrained(EMOJI / "scheduler", **options)


def test_shape_range_and_repeat(world):
    images = images_of(world)
    size = world.image_size
    assert images.shape == (5, 3, size, size) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, images_of(world))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_image_does_not_depend_on_its_batch(world, batch_size):
    """Bit for bit would need one algorithm for every batch size; CPU libraries choose by size, and
    sum in another order.

    Differences of single precision, 1e-7 a step, grow a little over the steps: 1e-4 is a fortieth
    of an 8-bit level.
    """
    whole = images_of(world)
    assert (images_of(world, batch_size=batch_size) - whole).abs().max() < 1e-4


def test_neighbours_do_not_matter(world):
    """With the batch size fixed, the same place in another batch gives the same bits."""
    a = images_of(world, PROMPTS[:3], SEEDS[:3])
    b = images_of(world, [PROMPTS[0], "fish", "crown"], [SEEDS[0], 77, 78])
    assert torch.equal(a[0], b[0])


# --- the oracle


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("sampler", THEIRS)
def test_equals_the_plain_pipeline(world, sampler, guidance):
    """Diffusers' own call with the same scheduler, latents and guidance."""
    parts = {**world.pipe.components, "scheduler": scheduler_of(sampler)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS[:2],
        latents=initial_noise(world, SEEDS[:2]),
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    how = {"sampler": sampler, "steps": 4, "guidance": guidance}
    ours = images_of(world, PROMPTS[:2], SEEDS[:2], **how)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 0.1  # images, not two of nothing


@pytest.mark.parametrize("guidance", [0.5, 0.0])
@pytest.mark.parametrize("sampler", THEIRS)
def test_guidance_below_one_is_combined_by_hand(world, sampler, guidance):
    """Diffusers' call drops guidance at 1 and below; the equation does not."""
    scheduler = scheduler_of(sampler)
    scheduler.set_timesteps(4)
    states = world.encode(PROMPTS[:2])
    null = world.encode([""]).expand_as(states)
    x = initial_noise(world, SEEDS[:2]) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            fed = scheduler.scale_model_input(x, t)
            eps_null, eps_c = (world.unet(fed, t, s).sample for s in (null, states))
            eps = (1 - guidance) * eps_null + guidance * eps_c
            x = scheduler.step(eps, t, x).prev_sample
    how = {"sampler": sampler, "steps": 4, "guidance": guidance}
    ours = images_of(world, PROMPTS[:2], SEEDS[:2], **how)
    assert torch.allclose(ours, to_images(world, x), atol=1e-5)


def test_every_sampler_has_an_oracle():
    assert THEIRS.keys() == SAMPLERS.keys()


def test_samplers_differ(world):
    images = [images_of(world, ["church"], [0], sampler=name, steps=4) for name in THEIRS]
    gaps = [(a - b).abs().max() for i, a in enumerate(images) for b in images[:i]]
    assert min(gaps) > 1e-3


# --- options


def test_seed_prompt_and_guidance_matter(world):
    a = images_of(world, ["church"], [0])
    for other in (
        images_of(world, ["church"], [1]),
        images_of(world, ["dog"], [0]),
        images_of(world, ["church"], [0], guidance=1.0),
    ):
        assert (a - other).abs().max() > 0.01


def test_the_world_s_own_sampling_is_the_default(tiny_world):
    tiny_world.sampling = Sampling(2, 3.0, "euler", batch_size=1)
    plain = sample(tiny_world, PROMPTS[:2], SEEDS[:2], progress=False)
    spelled = {"steps": 2, "guidance": 3.0, "sampler": "euler", "batch_size": 1, "progress": False}
    assert torch.equal(plain, sample(tiny_world, PROMPTS[:2], SEEDS[:2], **spelled))
    partly = sample(tiny_world, PROMPTS[:2], SEEDS[:2], guidance=1.0, progress=False)
    spelled["guidance"] = 1.0
    assert torch.equal(partly, sample(tiny_world, PROMPTS[:2], SEEDS[:2], **spelled))
    nothing = sample(tiny_world, PROMPTS[:2], SEEDS[:2], steps=None, sampler=None, progress=False)
    assert torch.equal(nothing, plain)  # None is the world's own, too


def test_hiding_changes_only_prompts_with_attention(world):
    prompts = ["a church in the style of Twemoji"]
    plain, hidden = images_of(world, prompts, [0]), images_of(world, prompts, [0], hide="church")
    assert (plain - hidden).abs().max() > 1e-3
    assert torch.equal(plain, images_of(world, prompts, [0]))  # the processors are back


@pytest.mark.parametrize("guidance", [5.0, 1.0, 0.5])
def test_positions_hide_what_a_phrase_hides(world, guidance):
    """In every batch, and at every guidance: each row its own positions."""
    prompts = ["a church in the style of Twemoji", "church", "Noto church"]
    options = {"guidance": guidance, "batch_size": 2}
    positions = find_tokens(world, prompts, "church")
    assert len({tuple(row) for row in positions}) > 1
    by_phrase = images_of(world, prompts, [0, 1, 2], hide="church", **options)
    by_position = images_of(world, prompts, [0, 1, 2], hide=positions, **options)
    assert torch.equal(by_phrase, by_position)
    plain = images_of(world, prompts, [0, 1, 2], **options)
    assert (by_phrase - plain).abs().amax((1, 2, 3)).min() > 1e-3


def test_an_edit_is_used_and_undone(world):
    name = next(n for n in world.parameters() if n.endswith("attn2.to_v.weight"))
    increment = torch.full_like(world.parameters()[name], 0.05)
    edit = Edit({name: increment}, meta={"base": world.fingerprint()})
    before = images_of(world, ["church"], [0])
    assert (images_of(world, ["church"], [0], edit=edit) - before).abs().max() > 1e-3
    assert torch.equal(images_of(world, ["church"], [0]), before)
    assert torch.equal(images_of(world, ["church"], [0], edit=0.0 * edit), before)


def test_states_take_the_prompts_place(tiny_world):
    states = tiny_world.encode(["dog", "Noto"])
    ours = images_of(tiny_world, ["church", "church"], [0, 1], states=states, batch_size=1)
    theirs = images_of(tiny_world, ["dog", "Noto"], [0, 1], batch_size=1)
    assert torch.equal(ours, theirs)


def test_batches_are_halved_when_memory_runs_out(tiny_world, monkeypatch):
    whole = images_of(tiny_world, batch_size=1)
    sizes, real = [], sampling.sample_batch

    def small(world, prompts, *args, **options):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(world, prompts, *args, **options)

    monkeypatch.setattr(sampling, "sample_batch", small)
    assert torch.equal(images_of(tiny_world, batch_size=4), whole)
    assert sizes == [4, 2, 1, 1, 1, 1, 1]

    def none(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(sampling, "sample_batch", none)
    edit = random_edit(tiny_world)
    with pytest.raises(torch.OutOfMemoryError):
        images_of(tiny_world, edit=edit)
    assert not tiny_world.is_edited


def test_steps_and_guidance_are_named(tiny_world):
    with pytest.raises(TypeError):
        sample(tiny_world, ["church"], [0], None, 3, 5.0)


@pytest.mark.parametrize(
    ("prompts", "seeds", "options", "said"),
    [
        ([], [], {}, "empty"),
        (["a", "b"], [1], {}, "2 prompts and 1 seeds"),
        ("church", [1], {}, "give a list"),
        (["church"], 1, {}, "give a list"),
        (["church"], [1], {"steps": 0}, "steps is 0"),
        (["church"], [1], {"batch_size": 0}, "batch_size is 0"),
        (["church"], [1], {"sampler": "heun"}, "'heun': choose from ddim, dpm"),
        (["church " * 40], [1], {}, "tokens"),
        (["church"], [1], {"hide": "dog"}, "does not hold 'dog'"),
        (["church"], [1], {"hide": ""}, "has no tokens"),
        (["church"] * 4, [1] * 4, {"hide": [[1]] * 2, "batch_size": 2}, "2 rows for 4 prompts"),
        (["church"], [1], {"hide": [[]]}, "nothing to hide"),
        (["church"], [1], {"states": torch.zeros(1, 2, 3)}, "states have shape"),
        (["church"], [1], {"bogus": 1}, "no option bogus: .*steps, guidance, sampler, batch_size"),
        (["church"], [1], {"zero": "church"}, "no option zero"),  # its name until version 2
    ],
)
def test_bad_input(tiny_world, prompts, seeds, options, said):
    with pytest.raises(ValueError, match=said):
        images_of(tiny_world, prompts, seeds, **options)


def test_sample_each_is_sample_prompt_by_prompt(world):
    how = {"steps": 1, "progress": False}
    each = sample_each(world, ["church", "dog", "church"], [3, 4], **how)
    assert list(each) == ["church", "dog"]
    together = sample(world, ["church", "church", "dog", "dog"], [3, 4, 3, 4], **how)
    assert torch.equal(torch.cat(list(each.values())), together)
