"""Learned words lie behind the vocabulary: they learn, the vocabulary does not move."""

import pytest
import torch
from laws import seeded
from torch import nn

from modular_concepts.errors import AdapterError
from modular_concepts.text.words import bounded, caption_ids, learned_rows, learned_tokens, new_token, token_ids


def generator(seed=0):
    return seeded(seed)


def table(vocab=6, width=4):
    embedding = nn.Embedding(vocab, width)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(vocab, width, generator=generator()))
    return embedding


def words(text):
    return [len(word) for word in text.split()]


def test_new_token_starts_at_the_class_word():
    start = torch.randn(2, 64, generator=generator())
    rows = new_token(start, 3, 0.1, generator(1))
    assert rows.shape == (3, 64)
    spread = (rows - start[[0, 1, 0]]).square().mean().sqrt() / start.square().mean().sqrt()
    assert 0.08 < spread < 0.12
    assert torch.equal(new_token(start, 3, 0.0, generator(1)), start[[0, 1, 0]])
    layered = new_token(start, 3, 0.1, generator(1), layers=16)
    assert layered.shape == (16, 3, 64) and torch.equal(layered[5], rows)


def test_ids_follow_the_vocabulary_and_triggers_are_whole_words():
    tokens = {"<x>": torch.zeros(2, 4), "<x>y": torch.zeros(16, 1, 4), "anna": torch.zeros(1, 4)}
    assert token_ids(tokens, 6) == {"<x>": [6, 7], "<x>y": [8], "anna": [9]}
    assert caption_ids("a <x> man, anna", tokens, 6, words) == [1, 6, 7, 4, 9]
    assert caption_ids("<x>y hannah", tokens, 6, words) == [8, 6]
    assert caption_ids("a man", {}, 6, words) == [1, 3]


def test_learned_rows_are_seen_and_the_vocabulary_is_as_before():
    embedding, tokens = table(), {"<x>": torch.randn(2, 4, generator=generator(1))}
    ids = torch.tensor([[1, 6, 7], [5, 0, 6]])
    before = embedding.weight.detach().clone()
    with learned_tokens(embedding, tokens):
        seen = embedding(ids)
    assert torch.equal(seen[0, 1:], tokens["<x>"])
    assert torch.equal(seen[1, :2], before[[5, 0]])
    assert torch.equal(embedding.weight, before)
    assert not embedding._forward_hooks and not embedding._forward_pre_hooks


def test_gradients_reach_exactly_the_learned_rows():
    embedding = table().requires_grad_(False)
    rows = nn.Parameter(torch.randn(3, 4, generator=generator(1)))
    with learned_tokens(embedding, {"<x>": rows}):
        embedding(torch.tensor([[1, 6, 7, 7]])).sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[1.0], [2.0], [0.0]]).expand(3, 4))
    assert embedding.weight.grad is None


def test_hooks_leave_with_an_exception_and_calls_may_nest():
    embedding, tokens = table(), {"<x>": torch.ones(1, 4)}
    with pytest.raises(RuntimeError, match="stop"), learned_tokens(embedding, tokens):
        raise RuntimeError("stop")
    assert not embedding._forward_hooks and not embedding._forward_pre_hooks
    with pytest.raises(IndexError):
        embedding(torch.tensor([6]))


def test_layer_wise_rows_need_their_layer():
    tokens = {"<x>": torch.arange(24.0).reshape(3, 2, 4), "<y>": torch.zeros(1, 4)}
    assert torch.equal(learned_rows(tokens, 2)[:2], tokens["<x>"][2])
    with pytest.raises(AdapterError, match="<x>.*3 layers"):
        learned_rows(tokens)
    embedding = table()
    with learned_tokens(embedding, tokens, layer=1):
        assert torch.equal(embedding(torch.tensor([6, 7])), tokens["<x>"][1])


def test_rows_of_another_width_are_refused():
    with (
        pytest.raises(AdapterError, match="8 wide.*4"),
        learned_tokens(table(), {"<x>": torch.zeros(1, 8)}),
    ):
        pass


def test_a_real_clip_text_model_sees_learned_words():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        bos_token_id=8,
        eos_token_id=9,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.CLIPTextModel(config).eval()
    embedding = model.get_input_embeddings()
    word = embedding.weight.detach()[3].clone()
    with torch.no_grad():
        known = model(torch.tensor([[8, 1, 3, 2, 9, 9]])).last_hidden_state
        with learned_tokens(embedding, {"<x>": word[None]}):
            same = model(torch.tensor([[8, 1, 10, 2, 9, 9]])).last_hidden_state
        with learned_tokens(embedding, {"<x>": -word[None]}):
            other = model(torch.tensor([[8, 1, 10, 2, 9, 9]])).last_hidden_state
    assert torch.equal(same, known)
    assert not torch.allclose(other, known, atol=1e-4)


def test_bounded_rows_keep_their_direction():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert torch.allclose(bounded(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
