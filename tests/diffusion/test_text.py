"""Text with token states: padding and hidden tokens change nothing, "no text" hides them all, and words count."""

import pytest
import torch
import torch.nn.functional as F

from latentloom.diffusion import Diffuser, Text, get_network
from latentloom.diffusion.blocks import CrossAttention, Tokens
from latentloom.diffusion.fast import attention
from latentloom.diffusion.text import concatenate, drop, no_text, pooled, trimmed

DIM, TOKEN_DIM = 12, 10


def text_of(lengths, *, seed: int = 0) -> Text:
    """Captions of so many tokens; padding is not zero, so that whoever reads it gives another result."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    return Text(
        torch.randn(len(lengths), DIM, generator=generator),
        torch.randn(len(lengths), longest, TOKEN_DIM, generator=generator),
        torch.arange(longest) < torch.tensor(lengths)[:, None],
    )


def padded(text: Text, count: int) -> Text:
    return Text(text.pooled, F.pad(text.tokens, (0, 0, 0, count), value=7.0), F.pad(text.mask, (0, count)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = get_network(8, 1, 16, 4, widths=(16, 32), text_dim=DIM, token_dim=TOKEN_DIM).eval()
    with torch.no_grad():  # the layers that end a block start at zero, and would let nothing through
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.requires_grad_(False)


def predict(network, text) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(len(text), 4, 8, 8, generator=generator)
    return network(x_t, torch.rand(len(text), generator=generator), text)


def test_masked_attention_is_that_of_torch_and_as_if_hidden_keys_were_not_there():
    query, key, value = (torch.randn(2, 3, count, 8) for count in (6, 5, 5))
    mask = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])
    expected = F.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    result = attention(query, key, value, mask)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result[:1], attention(query[:1], key[:1, :, :3], value[:1, :, :3]))


def test_cross_attention_over_tokens_of_which_all_are_seen_is_that_over_the_plain_tensor():
    layer = CrossAttention(16, 8)
    torch.nn.init.normal_(layer.out.weight)
    x, states = torch.randn(2, 16, 4, 4), torch.randn(2, 5, 8)
    everything = Tokens(states, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(layer(x, everything), layer(x, states))


def test_padding_and_what_stands_in_it_change_no_prediction(network):
    text = text_of([5, 2, 3])
    expected = predict(network, text)
    torch.testing.assert_close(predict(network, padded(text, 4)), expected)
    torch.testing.assert_close(predict(network, trimmed(padded(text, 4))), expected)


def test_a_token_that_is_seen_changes_the_prediction(network):
    text = text_of([5, 2, 3])
    other = text.tokens.clone()
    other[1, 1] = -other[1, 1]
    differs = (predict(network, Text(text.pooled, other, text.mask)) != predict(network, text)).flatten(1).any(1)
    assert differs.tolist() == [False, True, False]


def test_no_text_is_the_same_whatever_the_text_was(network):
    nothing = predict(network, no_text(text_of([5, 2, 3])))
    torch.testing.assert_close(nothing, predict(network, no_text(text_of([1, 4, 2], seed=3))))
    assert not torch.allclose(nothing, predict(network, text_of([5, 2, 3])))


def test_dropped_texts_are_no_text_and_the_others_stay(network):
    text = text_of([5, 2, 3])
    expected, nothing = predict(network, text), predict(network, no_text(text))
    dropped = predict(network, drop(text, torch.tensor([True, False, True])))
    torch.testing.assert_close(dropped, torch.stack([expected[0], nothing[1], expected[2]]))


def test_vectors_alone_are_treated_as_their_tensor():
    vectors = torch.randn(3, DIM)
    assert torch.equal(drop(vectors, torch.tensor([True, False, True]))[1], torch.zeros(DIM))
    assert torch.equal(no_text(vectors), torch.zeros(3, DIM))
    assert torch.equal(concatenate([vectors, vectors]), torch.cat([vectors, vectors]))
    assert trimmed(vectors) is vectors and pooled(vectors) is vectors


def test_texts_of_different_lengths_are_padded_when_they_are_put_together(network):
    short, long = text_of([2, 1]), text_of([6, 3, 4], seed=2)
    together = concatenate([short, long])
    assert together.mask.sum(1).tolist() == [2, 1, 6, 3, 4]
    assert together.mask.shape[1] == 6
    assert torch.equal(together[:2].tokens[:, :2], short.tokens)
    assert torch.equal(together[2:].tokens, long.tokens)


def test_guidance_is_that_of_the_formula(network):
    text, x_t = text_of([5, 2, 3]), torch.randn(3, 4, 8, 8)
    levels = torch.full((3,), 0.6)
    with_text, without = network(x_t, levels, text), network(x_t, levels, no_text(text))
    for w in (0.0, 1.0, 3.0):
        guided = Diffuser(network, w, 4).predict_x_zero(x_t, text, 0.6)
        torch.testing.assert_close(guided, w * with_text + (1 - w) * without, atol=1e-4, rtol=1e-4)


def test_a_sample_does_not_depend_on_the_longer_captions_in_its_batch(network):
    text, seeds = text_of([5, 2, 3]), torch.randn(3, 4, 8, 8)
    together = Diffuser(network, 3.0, 5).reverse_diffusion(seeds, text)
    alone = Diffuser(network, 3.0, 5).reverse_diffusion(seeds[1:2], trimmed(text[1:2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-3, rtol=1e-3)


def test_a_network_that_reads_the_vector_alone_takes_either_form():
    torch.manual_seed(0)
    network = get_network(8, 1, 16, 4, widths=(16, 32), text_dim=DIM).eval()
    text = text_of([5, 2, 3])
    torch.testing.assert_close(predict(network, text), predict(network, text.pooled))


def test_what_does_not_fit_is_named(network):
    text = text_of([5, 2, 3])
    with pytest.raises(ValueError, match="reads token states: give text_embeddings as a Text"):
        predict(network, text.pooled)
    with pytest.raises(ValueError, match=r"token states must be \(B, T, 10\), not \(3, 5, 12\)"):
        predict(network, Text(text.pooled, torch.zeros(3, 5, 12), text.mask))
    with pytest.raises(ValueError, match=r"a mask \(B, T\), not \(3, 12\), \(3, 5, 10\) and \(3, 4\)"):
        Text(text.pooled, text.tokens, text.mask[:, :4])
    with pytest.raises(ValueError, match="there are 3 for 2 samples"):
        Diffuser(network).predict_x_zero(torch.randn(2, 4, 8, 8), text, 0.5)


def test_whitening_learns_from_tokens_and_leaves_zeros(network):
    states = torch.randn(200, TOKEN_DIM) * torch.linspace(0.1, 2.0, TOKEN_DIM) + 1.0
    network.token_whitening.fit(states)
    features = network.token_whitening(states.reshape(20, 10, TOKEN_DIM)).reshape(200, TOKEN_DIM)
    torch.testing.assert_close(features.square().sum(1), torch.full((200,), float(TOKEN_DIM)))
    before, after = (own.std(0, correction=0) for own in (F.normalize(states, dim=1), features))
    assert after.max() / after.min() < before.max() / before.min() / 1.5
    assert not network.token_whitening(torch.zeros(1, 3, TOKEN_DIM)).any()
