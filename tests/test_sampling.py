"""Sampling: picture i depends on prompt i and seed i alone."""

import pytest
import torch

from helpers import Edit, load_world, sample
from helpers.sampling import initial_noise

PROMPTS = ["church", "Twemoji", "a dog in the style of OpenMoji", "santa claus", "a banana"]
SEEDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


def draw(world, prompts=PROMPTS, seeds=SEEDS, **options):
    return sample(world, prompts, seeds, **{"steps": 3, "progress": False, **options})


def test_shape_range_and_repeat(world):
    images = draw(world)
    assert images.shape == (5, 3, world.image_size, world.image_size) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, draw(world))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_picture_does_not_depend_on_its_batch(world, batch_size):
    """Bit for bit would need one algorithm for every batch size; CPU libraries choose by size, and sum in another order.

    Differences of single precision, 1e-7 a step, grow a little over the steps: 1e-4 is a fortieth of an 8-bit level.
    """
    whole = draw(world)
    assert (draw(world, batch_size=batch_size) - whole).abs().max() < 1e-4


def test_neighbours_do_not_matter(world):
    """With the batch size fixed, the same place in another batch gives the same bits."""
    a = draw(world, PROMPTS[:3], SEEDS[:3])
    b = draw(world, [PROMPTS[0], "fish", "crown"], [SEEDS[0], 77, 78])
    assert torch.equal(a[0], b[0])


def test_equals_the_plain_pipeline(world):
    """The oracle: diffusers' own call with the same noise."""
    pipe = world.pipe
    theirs = pipe(
        PROMPTS[:2],
        latents=initial_noise(world, SEEDS[:2]),
        num_inference_steps=3,
        guidance_scale=5.0,
        output_type="pt",
    ).images
    assert torch.allclose(draw(world, PROMPTS[:2], SEEDS[:2]), theirs, atol=1e-5)


def test_seed_prompt_and_guidance_matter(world):
    a = draw(world, ["church"], [0])
    for other in (draw(world, ["church"], [1]), draw(world, ["dog"], [0]), draw(world, ["church"], [0], guidance=1.0)):
        assert (a - other).abs().max() > 0.01


def test_zeroing_changes_only_prompts_with_attention(world):
    prompts = ["a church in the style of Twemoji"]
    plain, hidden = draw(world, prompts, [0]), draw(world, prompts, [0], zero="church")
    assert (plain - hidden).abs().max() > 1e-3
    assert torch.equal(plain, draw(world, prompts, [0]))  # the processors are back


def test_an_edit_is_used_and_undone(world):
    name = next(n for n, _ in world.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    edit = Edit({name: torch.full_like(world.unet.get_parameter(name), 0.05)}, meta={"base": world.fingerprint()})
    before = draw(world, ["church"], [0])
    assert (draw(world, ["church"], [0], edit=edit) - before).abs().max() > 1e-3
    assert torch.equal(draw(world, ["church"], [0]), before)
    assert torch.equal(draw(world, ["church"], [0], edit=0.0 * edit), before)


@pytest.mark.parametrize(
    ("prompts", "seeds", "options", "said"),
    [
        ([], [], {}, "empty"),
        (["a", "b"], [1], {}, "2 prompts and 1 seeds"),
        ("church", [1], {}, "lists"),
        (["church"], 1, {}, "lists"),
        (["church"], [1], {"steps": 0}, "steps is 0"),
        (["church " * 40], [1], {}, "tokens"),
        (["church"], [1], {"zero": "dog"}, "does not hold 'dog'"),
    ],
)
def test_bad_input(world, prompts, seeds, options, said):
    with pytest.raises(ValueError, match=said):
        draw(world, prompts, seeds, **options)
