"""Laws of the network: who sees whom, cache or no cache, what is fast."""

import threading
import time
from functools import partial

import pytest
import torch
from conftest import all_rows, random_model, random_prompts

import model as lm
import rollout
import tracerl
import value
from model import Layout
from plumbing import checkpoints, cuda, packing, parallel


def random_layout(seed, K=4, is_full=False):
    """A row of two documents and some padding, with clean text and several views of some blocks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []  # (position, document, block, view)
    for document, length in enumerate((11, 8)):
        if not is_full:
            tokens += [(p, document, p // K, 0) for p in range(length)]
        for view in range(1, 4):
            for block in range(1 if is_full else -(-length // K)):
                if torch.rand((), generator=generator) < 0.6:
                    span = range(length) if is_full else range(block * K, min(block * K + K, length))
                    tokens += [(p, document, block, view) for p in span]
    tokens += [(0, -1, 0, 0)] * 3
    return Layout(*torch.tensor(tokens).T[:, None])


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_the_rule_told_by_a_double_loop(seed, is_full):
    layout = random_layout(seed, is_full=is_full)
    mask = lm.dense_mask(layout)[0, 0]
    position, document, block, view = (t[0].tolist() for t in layout)
    for i in range(len(position)):
        for j in range(len(position)):
            sees = document[i] == document[j]
            if view[j] == 0:  # clean text: earlier blocks, or the own block of a clean token
                sees = sees and (block[j] < block[i] or (block[j] == block[i] and view[i] == 0))
            else:  # a view: only itself
                sees = sees and view[i] == view[j] and block[i] == block[j]
            assert mask[i, j] == sees, (i, j)


def test_block_size_1_is_causal_attention():
    position = torch.arange(9)[None]
    assert torch.equal(lm.dense_mask(Layout.clean(position, 1, False))[0, 0], torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("K", [1, 4, 8])
def test_a_later_block_never_changes_an_earlier_logit(K):
    model = random_model(block_size=K)
    tokens = torch.tensor(random_prompts([24]))
    changed = tokens.clone()
    changed[:, 16:] = torch.tensor(random_prompts([8], seed=1))
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :16], after[:, :16])
    assert not torch.allclose(before[:, 16:], after[:, 16:])


def test_a_token_sees_its_whole_block():
    model = random_model(block_size=4)
    tokens = torch.tensor(random_prompts([8]))
    changed = tokens.clone()
    changed[0, 7] = 3 + (tokens[0, 7] - 2) % 15
    assert (model(tokens)[0, 4] - model(changed)[0, 4]).abs().max() > 1e-3


def test_the_network_does_not_know_how_its_rows_are_packed():
    """A document sharing a row with another, or with padding, has the logits it has alone."""
    model = random_model()
    a, b = random_prompts([8, 12])
    both = torch.tensor([a + b + [0, 0]])
    position = torch.tensor([[*range(8), *range(12), 0, 0]])
    document = torch.tensor([[0] * 8 + [1] * 12 + [-1] * 2])
    attend = lm.attend_within(Layout.clean(position, 4, False, document))
    packed = model.head(model.hidden(both, position, attend))
    torch.testing.assert_close(packed[:, :8], model(torch.tensor([a])), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 8:20], model(torch.tensor([b])), atol=1e-5, rtol=1e-5)


def test_token_logprobs_are_log_softmax_without_the_mask_token():
    model = random_model()
    h, tokens = torch.randn(50, 32, requires_grad=True), torch.randint(3, 18, (50,))
    logits = model.head(h)
    logits = torch.cat([logits[:, :2], logits[:, 3:]], dim=1) / 0.7  # the mask token is number 2
    expected = logits.log_softmax(-1)
    picked = expected.gather(1, (tokens - 1)[:, None])[:, 0]
    logp, entropy = lm.token_logprobs(model, h, tokens, temperature=0.7, max_logits=7 * 18)
    torch.testing.assert_close(logp, picked)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    ours, = torch.autograd.grad(logp.sum(), h, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(picked.sum(), h)[0])


def test_log_probabilities_are_float32_whatever_the_weights_are():
    """Not only in type: bfloat16 logits of this size would be rounded to multiples of 0.125."""
    model = random_model().bfloat16()
    model.head.weight.data *= 20
    h, tokens = torch.randn(300, 32).bfloat16(), torch.randint(3, 18, (300,))
    logp, entropy = lm.token_logprobs(model, h.requires_grad_(), tokens, max_logits=7 * 18)
    assert logp.dtype == entropy.dtype == lm.head_logits(model, h).dtype == torch.float32
    exact = (h.double() @ model.head.weight.double().T).index_fill(1, torch.tensor([2]), -torch.inf)
    exact = exact.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (logp - exact).abs().max() < 1e-4 * exact.abs().max()
    logp.sum().backward()
    p = (h.double() @ model.head.weight.double().T).index_fill(1, torch.tensor([2]), -torch.inf).softmax(-1)
    gradient = (torch.nn.functional.one_hot(tokens, 18) - p).T @ h.double()
    assert (model.head.weight.grad - gradient).norm() < 0.01 * gradient.norm()


# ------------------------------------------------------------------------------------------- the fast paths


def rows_of_views(model, number=5, multiple=None):
    rollouts = rollout.generate(
        model, random_prompts(range(2, 2 + number)), max_new_tokens=14, threshold=0.4, eos_ids=(1,))
    return all_rows(rollouts, model.config, multiple=multiple)


@pytest.mark.parametrize("kind", ["sdar", "dream"])
@torch.no_grad()
def test_flex_attention_sees_what_the_dense_mask_shows(kind):
    """The GPU's attention, run without its compiler: packed rows, padding, grouped heads."""
    model = random_model(kind)
    rows = rows_of_views(model, multiple=128)
    assert rows.tokens.shape[1] % 128 == 0 and (rows.layout.document == -1).any()
    is_text = (rows.layout.document >= 0)[..., None]
    attends = [partial(lm.masked_attention, mask=mask(rows.layout))
               for mask in (lm.dense_mask, lm.block_mask)]
    dense, flex = (model.hidden(rows.tokens, rows.layout.position, attend) for attend in attends)
    torch.testing.assert_close(flex * is_text, dense * is_text, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sdar", "dream"])
def test_tiles_see_what_the_dense_mask_shows(kind):
    numbers = []
    for is_tiled in (False, True):
        model = random_model(kind)
        rows = rows_of_views(model)
        tiles = lm.tile_mask(rows.layout, size=16)
        attend = partial(lm.masked_attention, mask=tiles if is_tiled else lm.dense_mask(rows.layout))
        h = model.hidden(rows.tokens, rows.layout.position, attend).flatten(0, 1)[rows.targets.logit_index]
        h.square().sum().backward()
        numbers.append([h, *(p.grad for p in model.layers.parameters())])
    for ours, theirs in zip(*numbers):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.detach().abs().max()), rtol=1e-4)
    T = rows.tokens.shape[1]
    if kind == "sdar":  # most of a long row is never touched
        assert sum(part.shape[2] * len(keys) for _, keys, part in tiles) < 0.8 * T**2


def test_block_masks_are_traced_once_for_each_length():
    """What torch.compile meets on a GPU, with its backend left out: no graph break, no second compilation for
    other rows of the same length."""
    rows = [rows_of_views(random_model(seed=seed), multiple=1024).layout for seed in range(2)]
    created, create_block_mask = [], lm.create_block_mask

    def remember(rule, *sizes, device):
        created.append(rule)
        return create_block_mask(rule, *sizes, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "create_block_mask", remember)
        plain = [lm.block_mask(layout) for layout in rows]
    compiled = torch.compile(create_block_mask, backend="aot_eager", fullgraph=True, dynamic=False)
    T = rows[0].block.shape[1]
    for rule, mask, stance in zip(created, plain, ("default", "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            again = compiled(rule, 1, None, T, T, device=torch.device("cpu"))
        assert torch.equal(again.kv_num_blocks, mask.kv_num_blocks)


def test_computing_activations_again_changes_no_gradient():
    gradients = []
    for recomputes in (False, True):
        model = random_model()
        for layer in model.layers:
            layer.has_gradient_checkpointing = recomputes
        logp, _ = rollout.forward_rows(model, rows_of_views(model))
        logp.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_micro_batches_of_nothing_have_gradients_of_zero():
    """What a process without work goes along on: every parameter takes part, none moves."""
    model = random_model("sdar")
    rows = packing.collate([lm.Row([0], [0], [0], [1])], 0)
    assert len(rows.targets.token) == 0
    logp, _ = rollout.forward_rows(model, rows)
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("kind", ["sdar", "dream", "llada"])
def test_adapters_start_as_nothing_and_are_all_that_learns(kind, tmp_path):
    model, plain = random_model(kind), random_model(kind)
    parallel.add_lora(model, 3)
    tokens = torch.randint(3, 18, (2, 12))
    assert torch.equal(model(tokens), plain(tokens))
    optimizer = parallel.make_optimizer(model, 0.1, (0.9, 0.95))
    for _ in range(2):
        model(tokens).square().sum().backward()
        assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {
            "lora_A", "lora_B"}
        parallel.optimizer_step(model, optimizer, 1.0)
    assert not torch.allclose(model(tokens), plain(tokens), atol=1e-2)
    checkpoints.save_checkpoint(model, None, tmp_path / "merged")
    merged, _ = checkpoints.load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(tokens), model(tokens), atol=1e-4, rtol=1e-4)


def test_policy_and_value_model_share_the_frozen_trunk():
    policy = random_model()
    parallel.add_lora(policy, 2)
    critic = value.ValueModel(policy)
    for (name, p), q in zip(policy.layers.named_parameters(), critic.backbone.layers.parameters()):
        assert (p is q) == ("lora" not in name), name
    optimizer = parallel.make_optimizer(critic, 0.1, (0.9, 0.95))
    start = [p.clone() for p in policy.parameters()]
    rows = rows_of_views(policy)
    for _ in range(3):
        (critic(rows) - 1).square().sum().backward()
        parallel.optimizer_step(critic, optimizer, 1.0)
    assert critic(rows).abs().mean() > 0.1
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), start))


# ------------------------------------------------------------------------------------------------- settings


def test_a_plan_is_said_and_what_cannot_fit_is_refused_with_what_would(monkeypatch, capsys):
    config = checkpoints.read_config(dict(
        model_type="sdar", vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32,
        head_dim=128, num_key_value_heads=8, intermediate_size=9728, tie_word_embeddings=False))
    flags = ["--model=JetLM/SDAR-4B-Chat", "--train_data=a", "--eval_data=b", "--dtype=bfloat16"]

    def plan(gib, *more):
        args = tracerl.parse_args([*flags, *more])
        monkeypatch.setattr(cuda, "free_bytes", lambda device: gib * 2**30)
        cuda.plan_memory(config, args, has_critic=False)
        return args.tokens_per_micro_batch

    assert plan(80, "--lora_rank=32") == 16384
    assert "plan: 4.41 billion parameters in bfloat16" in capsys.readouterr().out
    assert 1024 <= plan(18, "--lora_rank=32") < 16384  # what fits
    with pytest.raises(ValueError, match=r"training needs 7\d\.\d GiB .* try --lora_rank 32"):
        plan(60)
    with pytest.raises(ValueError, match="a smaller --tokens_per_micro_batch"):
        plan(18, "--lora_rank=32", "--tokens_per_micro_batch=99999")


def test_settings_of_the_compiler_hold_in_every_thread():
    seen = []
    lm.compiled(lm.rotate)
    threading.Thread(target=lambda: (lm.compiled(lm.rotate), seen.append(
        torch._dynamo.config.recompile_limit))).start()
    while not seen:
        time.sleep(0.01)
    assert seen == [64]


def test_a_fused_function_compiles_for_all_shapes_at_once():
    """What `fused` hands to the compiler on a GPU, without its backend."""
    for function in (lm.rotate, lm.gated):
        whole = torch.compile(function.__wrapped__, dynamic=True, fullgraph=True, backend="eager")
        for B, T in ((2, 4), (3, 8)):
            x = torch.randn(B, 2, T, 6)
            others = lm.rotary(torch.arange(T).expand(B, T), 6, 1e4) if function is lm.rotate else (x + 1,)
            assert torch.equal(whole(x, *others), function(x, *others))
