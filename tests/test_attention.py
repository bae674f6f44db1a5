"""Cross-attention: the processor, what is recorded, tokens and their layers, and what is hidden."""

import math

import pytest
import torch
from answers import share_out
from diffusers.models.attention_processor import AttnProcessor2_0

from helpers import sample, widgets
from helpers.attention import (
    AttentionProcessor,
    cross_attentions,
    find_tokens,
    processors,
    record,
    token_maps,
    token_roles,
    zeroed,
)
from helpers.sampling import initial_noise

TWO = ["a church in the style of Twemoji", "Noto dog"]


def predict(world, prompts, *, guided=False, noise=None):
    """One noise prediction at t = 500: (b, c, h, w), the unconditional half first when guided."""
    x_t = initial_noise(world, list(range(len(prompts)))) if noise is None else noise
    text = world.encode(prompts)
    if guided:
        x_t, text = torch.cat([x_t, x_t]), torch.cat([world.encode([""]).expand_as(text), text])
    return world.unet(x_t, 500, text).sample


def inputs(attn, b=2, n=16, tokens=5):
    generator = torch.Generator().manual_seed(0)
    width, text_width = attn.to_q.in_features, attn.to_k.in_features
    hidden = torch.randn(b, n, width, generator=generator)
    return hidden, torch.randn(b, tokens, text_width, generator=generator)


def naive(attn, hidden, text):
    """Attention restated with loops: probabilities (b, heads, n, tokens) and the layer's output."""
    q, k, v = attn.to_q(hidden), attn.to_k(text), attn.to_v(text)
    d = q.shape[-1] // attn.heads
    A = torch.zeros(len(q), attn.heads, q.shape[1], k.shape[1])
    out = torch.zeros_like(q)
    for i in range(len(q)):
        for h in range(attn.heads):
            part = slice(h * d, (h + 1) * d)
            A[i, h] = torch.softmax(q[i, :, part] @ k[i, :, part].T / math.sqrt(d), -1)
            out[i, :, part] = A[i, h] @ v[i, :, part]
    return A, attn.to_out[0](out)


# --- the processor --------------------------------------------------------------------------------


def test_processor_equals_diffusers_and_a_naive_restatement(tiny_world):
    for attn in cross_attentions(tiny_world.unet).values():
        hidden, text = inputs(attn)
        kept = []
        out = AttentionProcessor(kept.append)(attn, hidden, text)
        A, expected = naive(attn, hidden, text)
        torch.testing.assert_close(out, AttnProcessor2_0()(attn, hidden, text))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(kept[0], A)
        torch.testing.assert_close(kept[0].sum(-1), torch.ones(A.shape[:3]))


def test_processor_without_text_is_self_attention(tiny_world):
    attn = next(m for n, m in tiny_world.unet.named_modules() if n.endswith("attn1"))
    hidden, _ = inputs(attn)
    torch.testing.assert_close(AttentionProcessor()(attn, hidden), AttnProcessor2_0()(attn, hidden))


def test_half_precision_scores_do_not_overflow(tiny_world):
    attn = next(iter(cross_attentions(tiny_world.unet).values()))
    hidden, text = inputs(attn)
    q, k = (
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for x in (attn.to_q(hidden), attn.to_k(text))
    )
    largest = (q @ k.transpose(-1, -2)).abs().max()
    with torch.no_grad():
        # scores over float16's 65504 before the division by sqrt(d), under it after
        for part in (attn.to_q, attn.to_k):
            part.weight.mul_((1e5 / largest).sqrt())
    kept = []
    AttentionProcessor(kept.append)(attn.half(), hidden.half(), text.half())
    assert torch.isfinite(kept[0]).all()


def test_weight_of_another_batch_raises(tiny_world):
    attn = next(iter(cross_attentions(tiny_world.unet).values()))
    hidden, text = inputs(attn, b=1)
    with pytest.raises(RuntimeError):
        AttentionProcessor(weight=torch.ones(2, text.shape[1]))(attn, hidden, text)


def test_weights_follow_each_prompt_and_the_releases_tiling_does_not(tiny_world):
    attn = max(cross_attentions(tiny_world.unet).values(), key=lambda module: module.heads)
    hidden, text = inputs(attn)
    weight = torch.ones(2, text.shape[1])
    weight[0, 1], weight[1, 3] = 0.0, 0.0
    ours = AttentionProcessor(weight=weight)(attn, hidden, text)
    loop = [
        AttentionProcessor(weight=weight[i : i + 1])(attn, hidden[i : i + 1], text[i : i + 1])
        for i in range(2)
    ]
    torch.testing.assert_close(ours, torch.cat(loop))

    def released(mask):
        """Batch and heads in one dimension, batch-major, as head_to_batch_dim lays them out."""
        A, _ = naive(attn, hidden, text)
        v = attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
        out = (A.flatten(0, 1) * mask[:, None, :]) @ v
        out = out.unflatten(0, (2, attn.heads)).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)

    torch.testing.assert_close(ours, released(weight.repeat_interleave(attn.heads, 0)))
    assert not torch.allclose(ours, released(weight.repeat(attn.heads, 1)), atol=1e-4)
    same = torch.ones(2, text.shape[1])
    # one concept in the whole batch: the tiling happens to be right, which is why it went unseen
    same[:, 1] = 0.0
    torch.testing.assert_close(
        AttentionProcessor(weight=same)(attn, hidden, text), released(same.repeat(attn.heads, 1))
    )


# --- layers ---------------------------------------------------------------------------------------


def test_cross_attentions_stand_in_the_order_of_execution(tiny_world):
    found = cross_attentions(tiny_world.unet)
    ran, handles = [], []
    for name, module in found.items():
        handles.append(module.register_forward_hook(lambda *_, name=name: ran.append(name)))
    predict(tiny_world, ["church"])
    for handle in handles:
        handle.remove()
    assert list(found) == ran
    levels = [name.split("_")[0] for name in found]
    assert levels == sorted(levels, key=["down", "mid", "up"].index) and len(set(levels)) == 3
    listed = [name for name, _ in tiny_world.unet.named_modules() if name.endswith("attn2")]
    assert listed[-1].startswith("mid_block") and set(listed) == set(found)


def test_unknown_or_empty_layers_raise(tiny_world):
    with (
        pytest.raises(ValueError, match=r"attn9.*mid_block"),
        record(tiny_world.unet, layers=["attn9"]),
    ):
        pass
    with pytest.raises(ValueError, match="empty"), record(tiny_world.unet, layers=[]):
        pass


# --- recording ------------------------------------------------------------------------------------


def test_record_keeps_every_pass_and_changes_nothing(tiny_world):
    before = predict(tiny_world, TWO)
    layers = cross_attentions(tiny_world.unet)
    with record(tiny_world.unet) as maps:
        during = predict(tiny_world, TWO)
        predict(tiny_world, TWO)
    torch.testing.assert_close(during, before)
    assert list(maps) == list(layers)
    for name, passes in maps.items():
        assert len(passes) == 2
        assert passes[0].shape[:2] == (2, layers[name].heads)
        assert passes[0].shape[3] == tiny_world.text_length
        torch.testing.assert_close(passes[0].sum(-1), torch.ones(passes[0].shape[:3]))
    assert len({passes[0].shape[2] for passes in maps.values()}) > 1  # several resolutions
    assert torch.equal(predict(tiny_world, TWO), before)


def test_record_equals_the_naive_probabilities_inside_the_model(tiny_world):
    name, attn = list(cross_attentions(tiny_world.unet).items())[-1]
    seen = []
    handle = attn.register_forward_pre_hook(
        lambda _, args, kw: seen.append((args[0], kw)), with_kwargs=True
    )
    with record(tiny_world.unet, layers=[name]) as maps:
        predict(tiny_world, TWO)
    handle.remove()
    (hidden, keywords), *_ = seen
    expected, _ = naive(attn, hidden, keywords["encoder_hidden_states"])
    torch.testing.assert_close(maps[name][0], expected)


def test_processors_come_back_even_after_an_exception(tiny_world):
    def now():
        layers = cross_attentions(tiny_world.unet)
        return {name: id(module.processor) for name, module in layers.items()}

    before = now()
    with record(tiny_world.unet):
        assert now() != before
    assert now() == before
    with pytest.raises(KeyError), record(tiny_world.unet):
        raise KeyError
    assert now() == before
    made = []

    def fails_at_the_third(name):
        made.append(name)
        if len(made) == 3:
            raise KeyError(name)
        return AttentionProcessor()

    with pytest.raises(KeyError), processors(tiny_world.unet, fails_at_the_third):
        pass
    assert now() == before


def test_hooks_do_not_nest(tiny_world):
    columns = find_tokens(tiny_world, TWO[:1], "church")
    with record(tiny_world.unet):
        with (
            pytest.raises(RuntimeError, match="hooked already"),
            zeroed(tiny_world, columns, guided=False),
        ):
            pass
        with pytest.raises(RuntimeError, match="hooked already"):
            sample(tiny_world, TWO[:1], [0], steps=1, hide="church", progress=False)


def test_chosen_columns_and_layers_only(tiny_world):
    last = list(cross_attentions(tiny_world.unet))[-1]
    with record(tiny_world.unet, layers=[last]) as every:
        predict(tiny_world, TWO)
    with record(tiny_world.unet, layers=[last], columns=[2, 5]) as chosen:
        predict(tiny_world, TWO)
    assert list(chosen) == [last]
    torch.testing.assert_close(chosen[last][0], every[last][0][..., [2, 5]])
    with pytest.raises(ValueError, match="empty"), record(tiny_world.unet, columns=[]):
        pass


def test_gradients_flow_through_recorded_maps(tiny_world):
    last, attn = list(cross_attentions(tiny_world.unet).items())[-1]
    attn.to_k.weight.requires_grad_(True)
    attn.to_v.weight.requires_grad_(True)
    with record(tiny_world.unet, layers=[last], columns=[1]) as maps:
        predict(tiny_world, TWO)
    maps[last][0].norm().backward()
    assert attn.to_k.weight.grad.abs().sum() > 0
    assert attn.to_v.weight.grad is None  # probabilities do not depend on the values
    with torch.no_grad(), record(tiny_world.unet, layers=[last]) as maps:
        predict(tiny_world, TWO)
    assert not maps[last][0].requires_grad


def test_token_maps_are_the_mean_over_heads_row_by_row():
    A = torch.rand(2, 3, 9, 4)
    maps = token_maps(A)
    assert maps.shape == (2, 4, 3, 3)
    for i, token, pixel in ((0, 1, 5), (1, 3, 7)):
        value = maps[i, token, pixel // 3, pixel % 3]
        torch.testing.assert_close(value, A[i, :, pixel, token].mean())
    with pytest.raises(ValueError, match="square"):
        token_maps(torch.rand(1, 2, 8, 4))


# --- tokens ---------------------------------------------------------------------------------------


def test_find_tokens_names_every_occurrence_and_the_whole_phrase(tiny_world):
    prompts = ["a church in the style of Twemoji", "church church", "Twemoji church"]
    assert find_tokens(tiny_world, prompts, "church") == [[2], [1, 2], [2]]
    prompts = ["a articulated lorry", "articulated lorry"]
    lorry = find_tokens(tiny_world, prompts, "articulated lorry")
    assert lorry == [[2, 3], [1, 2]]
    (overlapping,) = find_tokens(tiny_world, ["dog dog dog"], "dog dog")
    assert overlapping == [1, 2, 3]  # each position once
    assert find_tokens(tiny_world, ["CHURCH"], "church") == [[1]]


@pytest.mark.parametrize("phrase", ["castle", "church Noto", "lorry articulated"])
def test_a_phrase_that_is_not_in_the_prompt_raises(tiny_world, phrase):
    with pytest.raises(ValueError, match=phrase.split()[0]):
        find_tokens(tiny_world, ["a church in the style of Twemoji"], phrase)
    with pytest.raises(ValueError, match="'dog'"):
        find_tokens(tiny_world, [phrase, "dog"], phrase)


@pytest.mark.parametrize("phrase", ["", "   "])
def test_an_empty_phrase_raises(tiny_world, phrase):
    with pytest.raises(ValueError, match="no tokens"):
        find_tokens(tiny_world, ["a church"], phrase)


def test_roles_tell_eos_from_padding_of_the_same_id(tiny_world):
    ids = tiny_world.token_ids(["Twemoji church"])[0]
    roles = token_roles(tiny_world, "Twemoji church")
    assert roles == ["BOS", "twemoji", "church", "EOS", *["padding"] * (tiny_world.text_length - 4)]
    assert ids[3] == ids[-1]  # why a mask by id flags the padding too
    assert len(token_roles(tiny_world, "")) == tiny_world.text_length


def test_a_word_changes_the_states_after_it_and_none_before(tiny_world):
    prompts = [f"a {thing} in the style of Twemoji" for thing in ("church", "castle")]
    one, other = tiny_world.encode(prompts)
    at = find_tokens(tiny_world, prompts[:1], "church")[0][0]
    torch.testing.assert_close(one[:at], other[:at])
    assert ((one - other)[at:].norm(dim=-1) > 0).all()


# --- hiding ---------------------------------------------------------------------------------------


def test_zeroed_changes_the_conditional_half_only(tiny_world):
    columns = [
        find_tokens(tiny_world, TWO[:1], "church")[0],
        find_tokens(tiny_world, TWO[1:], "dog")[0],
    ]
    plain = predict(tiny_world, TWO, guided=True)
    with zeroed(tiny_world, columns, guided=True):
        hidden = predict(tiny_world, TWO, guided=True)
    torch.testing.assert_close(hidden[:2], plain[:2])
    for i in (2, 3):
        assert not torch.allclose(hidden[i], plain[i], atol=1e-5)
    assert torch.equal(predict(tiny_world, TWO, guided=True), plain)
    with zeroed(tiny_world, columns, guided=False):
        torch.testing.assert_close(predict(tiny_world, TWO), hidden[2:])


def test_zeroed_batches_equal_single_prompts(tiny_world):
    columns = [[2], [1, 2]]
    noise = initial_noise(tiny_world, [0, 1])
    with zeroed(tiny_world, columns, guided=False):
        together = predict(tiny_world, TWO, noise=noise)
    for i in range(2):
        with zeroed(tiny_world, columns[i : i + 1], guided=False):
            alone = predict(tiny_world, TWO[i : i + 1], noise=noise[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_hiding_nothing_raises(tiny_world):
    for columns in ([], [[1], []]):
        with (
            pytest.raises(ValueError, match="nothing to hide"),
            zeroed(tiny_world, columns, guided=True),
        ):
            pass


def test_sampling_with_a_hidden_phrase_restores_the_model(tiny_world):
    plain = sample(tiny_world, TWO[:1], [3], steps=2, progress=False)
    hidden = sample(tiny_world, TWO[:1], [3], steps=2, hide="church", progress=False)
    assert not torch.allclose(plain, hidden)
    assert torch.equal(sample(tiny_world, TWO[:1], [3], steps=2, progress=False), plain)


# --- the panel ------------------------------------------------------------------------------------


def test_panel_redraws_the_figure_of_the_plain_call(tiny_world):
    with torch.no_grad(), record(tiny_world.unet) as maps:
        predict(tiny_world, TWO[:1])
        predict(tiny_world, TWO[:1], noise=initial_noise(tiny_world, [7]))
    first, *_, last = maps
    titles = {1: "a", 2: "church"}
    image = torch.rand(3, 16, 16)
    figure = widgets.attention_figure(image, maps, titles, layer=last, step=0)
    assert [ax.get_title() for ax in figure.axes[:3]] == ["image", "a", "church"]
    panel = widgets.attention_panel(image, maps, titles, layer=last, step=0)
    relative = widgets.attention_figure(image, maps, titles, layer=last, step=0, relative=True)
    shown = [torch.as_tensor(ax.images[1].get_array().data) for ax in relative.axes[1:3]]
    assert [values.mean().item() for values in shown] == pytest.approx([1.0, 1.0], abs=1e-5)
    controls, picture = panel.children
    steps, layers = controls.children
    opened = bytes(picture.value)
    assert opened == widgets.png(figure) and opened.startswith(b"\x89PNG")
    steps.value = 1
    assert picture.value != opened
    steps.value, layers.value = 0, first
    figure = widgets.attention_figure(image, maps, titles, layer=first, step=0)
    assert picture.value == widgets.png(figure)
    with pytest.raises(ValueError, match="step 2"):
        widgets.attention_figure(image, maps, titles, layer=last, step=2)
    with pytest.raises(ValueError, match="attn9"):
        widgets.attention_figure(image, maps, titles, layer="attn9", step=0)


# --- sharing out ----------------------------------------------------------------------------------


def test_sharing_out_all_from_a_position_on_equals_a_text_cut_there(tiny_world):
    """What is left cannot depend on the word; after plain zeroing it still does."""
    attn = next(iter(cross_attentions(tiny_world.unet).values()))
    hidden, text = inputs(attn)
    weight = torch.ones(2, text.shape[1])
    weight[:, 2:] = 0.0
    kept = []
    zeroed_out = AttentionProcessor(kept.append, weight)(attn, hidden, text)
    v = attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    shared = attn.to_out[0]((share_out(kept[0], weight) @ v).transpose(1, 2).flatten(2))
    cut = AttentionProcessor()(attn, hidden, text[:, :2])
    torch.testing.assert_close(shared, cut)
    assert not torch.allclose(zeroed_out, cut, atol=1e-3)
