"""What is handed on: arguments, seeds, defaults and files reach the place where they count.

Each test fails after a one-line change somewhere between a flag and its use, which no other test saw.
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import FAST, FIXTURES, PLAIN, all_rows, decode, random_model, random_prompts, seen, small_data
from safetensors.torch import load_file
from test_engine import check_same
from test_runs import finish, start_all
from test_sft import examples, small_task
from test_tracerl import DECODING, flat, groups_of, keep, learners_of, method_of, one_update, recipe_of

import eval_math
import model as lm
import rollout
import sft
import tracerl
import value
from eval_math import Examinee, Problem
from plumbing import (
    autoregressive, check, checkpoints, data, engine, flags, memory, packing, parallel, prompts, runs, show,
    tasks, tiny)
from plumbing.prompts import Prompting, encode_prompts
from rollout import Decoding, Rollout

SMALL = ["--model", str(FIXTURES / "tiny"), "--train_data=train.jsonl", "--eval_data=test.jsonl",
         "--prompts=4", "--group_size=4", "--lr=1e-3", "--warmup=0", "--eval_every=0",
         "--eval_strategies=dynamic", "--eval_limit=2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with small data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    small_data(tmp_path)
    return tmp_path


def test_each_step_asks_other_prompts_g_times_with_draws_of_their_own():
    echo = lambda model, prompts, seeds, decoding: [
        Rollout(p, [4], 1, [1], seed=s) for p, s in zip(prompts, seeds)]
    method = method_of(compute=PLAIN._replace(generate=echo))
    problems = [Problem("", "", tokens=[i]) for i in range(3, 8)]
    ask = lambda seed: [tracerl.roll_out(random_model(), problems, method,
                        recipe_of(seed=seed, prompts=2, group_size=3), step) for step in range(1, 6)]
    found = ask(1)
    for rollouts, asked in found:
        assert [r.group for r in rollouts] == [0, 0, 0, 1, 1, 1]
        assert [r.prompt for r in rollouts] == [p.tokens for p in asked]
        assert asked == [asked[0]] * 3 + [asked[3]] * 3
    seeds = [r.seed for rollouts, _ in found for r in rollouts]
    assert len(set(seeds)) == 30
    order = [asked[i].tokens[0] for _, asked in found for i in (0, 3)]
    assert sorted(order[:5]) == sorted(order[5:]) == [3, 4, 5, 6, 7] and order[:5] != order[5:]
    assert order != [asked[i].tokens[0] for _, asked in ask(2) for i in (0, 3)]


def test_every_problem_belongs_to_one_split():
    for text in (f"{a}+{b}=" for a in range(100, 140) for b in range(100, 140)):
        assert sum(tasks.is_of(split, text) for split in ("train", "dev", "test")) == 1


def test_no_prompt_is_lost_between_portions():
    problems = [Problem(f"{i}+1=", "") for i in range(2500)]
    tokenizer = tiny.tiny_tokenizer()
    fitting, _ = encode_prompts(problems, tokenizer)
    assert len(fitting) == 2500 and all(tokenizer.decode(p.tokens) == p.problem for p in fitting)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_chunks_of_the_head_use_their_own_draws(kind, monkeypatch):
    model, prompts, settings = random_model(kind), random_prompts([3, 9, 6, 5]), dict(max_new_tokens=12)
    plain = decode(model, prompts, PLAIN, **settings)
    monkeypatch.setattr(memory, "most_logits", lambda *_, **__: 3 * 18)
    check_same(decode(model, prompts, **settings), plain)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step-80", "step-100", "step-9", "step-200.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [os.path.basename(p) for p in runs.checkpoints_of(tmp_path)] == ["step-9", "step-80", "step-100"]


def test_accuracy_is_the_graders_whatever_the_reward():
    tokens = tiny.tiny_tokenizer()("\\boxed{5}", add_special_tokens=False).input_ids + [1]
    five = lambda model, prompts, seeds, decoding: [Rollout(p, tokens, 4, [1, 2, 3, 4]) for p in prompts]
    compute = PLAIN._replace(generate=five)
    one = Examinee(torch.nn.Identity(), tiny.tiny_tokenizer(), Decoding(), compute, lambda text: 7.0)
    found = one.evaluate([Problem("2+3=", "5"), Problem("2+2=", "4")])
    assert found["accuracy"] == 0.5 and found["reward"] == 7


@pytest.mark.parametrize("gap, more, stops", [
    (0.01, [], True), (1.5e-4, [], True), (1.5e-4, ["--temperature=0.5"], False),
    (0.01, ["--max_gap=0.02"], False)])
def test_a_run_that_does_not_replay_ends_before_anything_is_written(gap, more, stops, folder, monkeypatch):
    replay = rollout.replay
    monkeypatch.setattr(rollout, "replay", lambda *a, **k: [logp + gap for logp in replay(*a, **k)])
    if stops:
        with pytest.raises(RuntimeError, match="the replay law is broken"):
            tracerl.main([*SMALL, "--steps=1"])
        assert not Path("runs/tracerl/args.json").exists()  # the self-check: before anything is written
    else:
        tracerl.main([*SMALL, "--steps=1", *more])


def test_gradients_are_clipped_and_five_that_are_not_finite_end_a_run():
    learner = parallel.Learner(random_model(), None)
    learner = learner._replace(optimizer=torch.optim.SGD(learner.model.parameters(), lr=1.0))

    def step(scale):
        """A step along scale times the weights."""
        sum(p.square().sum() for p in learner.model.parameters()).mul(scale).backward()
        return parallel.optimizer_step(learner)

    start = flat(learner.model)
    assert step(100.0)["gradient_norm"] > 100
    assert (flat(learner.model) - start).norm().item() == pytest.approx(1, rel=1e-3)
    for _ in range(4):
        step(float("nan"))
    step(1.0)
    for _ in range(4):
        step(float("nan"))
    with pytest.raises(RuntimeError, match="5 updates in a row"):
        step(float("nan"))


def test_the_loop_hands_shrink_on_to_the_value_model():
    model = random_model()
    rollouts = groups_of(model)
    learner = parallel.Learner(value.ValueModel(model), None)
    learner.model.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    value.value_advantages(learner.model, rollouts, FAST, 2)
    expected = [r.advantage for r in rollouts]
    tracerl.give_advantages(rollouts, learner, method_of(), recipe_of(shrink=2))
    assert [r.advantage for r in rollouts] == expected


def test_groups_outside_of_keep_range_are_dropped_on_both_sides():
    make = lambda rewards: [Rollout([1], [2, 3], 2, [1, 2], reward=r) for r in rewards]
    rollouts = make([1.0, 1, 1, 0, 0, 1, 0, 1])
    assert keep(rollouts, keep_range=(0.3, 0.7)) == rollouts[4:]


def test_a_resumed_run_keeps_its_accuracy_before_and_its_largest_gap(folder, monkeypatch):
    calls = []
    evaluate = Examinee.evaluate
    monkeypatch.setattr(
        Examinee, "evaluate", lambda self, *a, **k: calls.append(k) or evaluate(self, *a, **k))
    first = tracerl.main([*SMALL, "--steps=1", "--seed=3"])
    again = tracerl.main(["--resume", "--steps=2"])
    assert again["before"] == first["before"] and len(calls) == 3
    assert all(k["seed"] == 3 for k in calls)
    lines = [json.loads(line) for line in open("runs/tracerl/metrics.jsonl")]
    assert again["replay_gap_max"] == max(line["gap_max"] for line in lines) > 0


def test_sft_reads_gsm8k_with_a_box_and_a_pupil_as_careless_as_asked(folder, monkeypatch):
    row = dict(question="1+2=", answer="So it is <<1+2=3>>3, as one sees.\n#### 3")
    Path("g.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(sft, "to_examples", lambda problems, *_: problems * 99)
    args = sft.parse_args(["--model=x", "--data=g.jsonl"])
    problem, *_ = sft.load_examples(tiny.tiny_tokenizer(), random_model().config, args, Prompting())
    assert problem.solution == "So it is 3, as one sees.\nThe answer is \\boxed{3}."
    given = []
    rows = [dict(problem="1+2=", answer="3", solution="3")]
    monkeypatch.setitem(tasks.EMBEDDED, "arithmetic", lambda *how: given.append(how) or rows)
    args = sft.parse_args(["--seed=5", "--slip=0.3"])
    sft.load_examples(tiny.tiny_tokenizer(), random_model().config, args, Prompting())
    assert given == [("train", 20000, 5, 0.3)]


def test_old_log_probabilities_are_at_the_temperature_of_the_rollouts():
    model = random_model()
    decoding = dataclasses.replace(DECODING, temperature=0.5)
    method = method_of(decoding=decoding, law=rollout.ReplayLaw(True, 0.5))
    kept = keep(groups_of(model, temperature=0.5))
    _, _, batches = one_update(model, kept, method, lr=1e-9, minibatches=2)
    assert len(batches) == 2
    for rows in [rows for batch in batches for rows in batch.rows]:
        torch.testing.assert_close(rows.targets.logp_old, rows.targets.logp, atol=3e-4, rtol=0)


def test_a_saved_value_model_is_loaded_and_each_learner_has_its_betas(tmp_path):
    checkpoints.save_checkpoint(random_model(), tiny.tiny_tokenizer(), tmp_path)
    saved = value.ValueModel(random_model(seed=1))
    saved.value_head.weight.data.normal_()
    checkpoints.save_weights(saved, tmp_path / "value")
    args = tracerl.parse_args([f"--model={tmp_path}", "--train_data=arithmetic", "--advantage=value"])
    learners, _ = tracerl.load_start(args)
    pairs = zip(learners.value.model.parameters(), saved.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert [learner.optimizer.param_groups[0]["betas"][1] for learner in learners] == [0.95, 0.999]


def test_the_end_of_a_chat_turn_is_the_eos_that_is_taught():
    vocabulary = {"<|im_end|>": 7, "<|endoftext|>": 5}
    tokenizer = type("Tokenizer", (), dict(eos_token_id=5, get_vocab=lambda self: vocabulary))()
    assert checkpoints.find_eos_ids([5], tokenizer) == (7, 5)


@pytest.mark.parametrize("is_weighted", [True, False])
def test_the_loss_of_fine_tuning_is_divided_by_what_it_says(is_weighted):
    model, batch = random_model(), examples()
    targets = all_rows(batch, model.config, views=sft.noise_views)
    logp, _ = rollout.forward_rows(model, targets, PLAIN)
    share = targets.targets.masked_share
    expected = -(logp / share).sum() / 28 if is_weighted else -logp.mean()
    learner = parallel.make_learner(model, 1e-9, (0.9, 0.98))
    loss, _ = sft.train_step(learner, batch, sft.noise_views, is_weighted, PLAIN)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_learning_rate_rises_during_the_warmup():
    model = random_model()
    kept = keep(groups_of(model))
    learners = learners_of(model)
    recipe = recipe_of(lr=0.1, warmup=10)
    batches, _ = tracerl.old_logprobs(learners, kept, kept, method_of(), recipe, 3)
    tracerl.learn(learners, batches, kept, method_of(), recipe, 3)
    assert learners.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.03)


def test_gradient_checkpointing_computes_every_layer_twice(monkeypatch):
    calls = []
    compute = lm.Layer.compute
    monkeypatch.setattr(lm.Layer, "compute", lambda self, *a: calls.append(1) or compute(self, *a))
    model = random_model()
    for layer in model.layers:
        layer.has_gradient_checkpointing = True
    model(torch.tensor(random_prompts([8]))).sum().backward()
    assert len(calls) == 4


def test_names_of_data_stand_for_their_own_splits():
    assert {name: source.rpartition(":")[2] for name, source in data.HUB.items()} == dict(
        math500="test", gsm8k="test", aime2024="train", aime2025="test") | {"gsm8k-train": "train"}


def test_the_value_model_reads_the_trace_with_its_clip_and_epochs(monkeypatch):
    seen, loss = [], value.value_loss
    monkeypatch.setattr(value, "value_loss", lambda *a: seen.append(a[3:]) or loss(*a))
    model = random_model()
    rollouts = groups_of(model)
    critic = value.ValueModel(model)
    learners = learners_of(model)._replace(value=parallel.make_learner(critic, 1e-3, (0.9, 0.999)))
    recipe = recipe_of(value_epochs=3, value_clip=0.2)
    random = method_of(views=rollout.random_views)
    tracerl.give_advantages(rollouts, learners.value, random, recipe)
    batches, _ = tracerl.old_logprobs(learners, rollouts, rollouts, random, recipe, 1)
    tracerl.learn(learners, batches, rollouts, random, recipe, 1)
    assert seen == [(sum(r.num_tokens for r in rollouts), 0.2)] * 3 * len(batches[0].value_rows)


def test_a_trace_with_full_attention_replays_on_its_canvas_at_its_temperature(tmp_path, capsys):
    model = random_model("llada")
    rollouts = decode(model, random_prompts([5, 9, 6] * 6), max_new_tokens=14, temperature=0.7, seed=3)
    assert any(len(r.response) < r.canvas for r in rollouts)
    names = ("prompt", "response", "step_map", "logp", "canvas")
    rows = [{name: getattr(r, name) for name in names} for r in rollouts]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check.check(model, str(tmp_path / "t.jsonl"), PLAIN, 0.7)
    assert "The replay agrees" in capsys.readouterr().out


def test_sft_goes_on_only_with_the_same_examples(folder):
    rows = tasks.arithmetic("train", 32)
    write = lambda rows: Path("d.jsonl").write_text("\n".join(
        json.dumps(dict(prompt=row["problem"], response=row["solution"])) for row in rows))
    write(rows)
    sft.main(["--model", str(FIXTURES / "tiny"), "--data=d.jsonl", "--steps=1", "--batch_size=8",
              "--max_new_tokens=20"])
    write(rows[::-1])
    with pytest.raises(ValueError, match="the examples of --data have changed"):
        sft.main(["--resume", "--steps=2"])


def test_truncated_and_unanswered_are_fractions():
    line = dict(text="a", gold="1", correct=True, truncated=True, answer=None, length=2, decoded=2,
                step_map=[1], seconds=1)
    found = eval_math.summarize([line, line | dict(text="b", truncated=False, answer="1")])
    assert found["truncated"] == found["unanswered"] == 0.5


def test_adapters_have_a_learning_rate_of_their_own():
    real = ["--model=m", "--train_data=a", "--eval_data=b"]
    assert tracerl.parse_args([*real, "--lora_rank=8"]).lr == 1e-5


def test_a_loss_is_given_the_clip_of_the_flags():
    model = random_model()
    got = []
    loss = lambda logp, clip_eps: got.append(clip_eps) or logp.sum()
    one_update(model, keep(groups_of(model)), method_of(loss=loss), clip_eps=0.1)
    assert set(got) == {0.1}


def test_an_update_without_targets_does_not_move_the_policy():
    model = random_model()
    nothing = lambda block, rollout: [(block, block)] if rollout.group == 0 else []
    kept = keep(groups_of(model))
    method = method_of(views=nothing)
    line, _, batches = one_update(model, kept, method, minibatches=len(kept) // 4)
    numbers = [batch.num_tokens for batch in batches]
    assert sum(number > 0 for number in numbers) == 1 and len(numbers) > 1
    assert line["trained_tokens"] == sum(numbers)
    assert line["gradient_norm"] > 0 and line["ratio_max"] == 1


def test_an_autoregressive_model_has_the_defaults_of_a_real_one(monkeypatch):
    monkeypatch.setattr(eval_math, "evaluate_command", lambda args: args.max_new_tokens)
    assert eval_math.main(["--ar=some/model"]) == 2000 and eval_math.main([]) == 20


def test_a_saved_config_says_what_was_chosen_and_the_index_which_files_there_are(tmp_path):
    checkpoints.save_checkpoint(random_model(), None, tmp_path / "a", max_shard_size="10KB")
    model, _ = checkpoints.load_model(tmp_path / "a", block_size=8)
    model.config.mask_id, model.config.pad_id, model.config.eos_ids = 17, 5, (1, 9)
    checkpoints.save_checkpoint(model, None, tmp_path / "b", torch.bfloat16, max_shard_size="15KB")
    again = checkpoints.find_checkpoint(tmp_path / "b")[1]
    assert (again.block_size, again.mask_id, again.eos_ids) == (8, 17, (1, 9))
    read = lambda name: json.loads((tmp_path / "b" / name).read_text())
    assert read("config.json")["dtype"] == read("config.json")["torch_dtype"] == "bfloat16"
    assert read("generation_config.json") == dict(eos_token_id=[1, 9], pad_token_id=5)
    files = {path.name for path in (tmp_path / "b").glob("*.safetensors")}
    assert set(read("model.safetensors.index.json")["weight_map"].values()) == files


def test_value_advantages_are_the_recursions_over_merged_trace_steps(monkeypatch):
    monkeypatch.setattr(value.returns_and_advantages, "__defaults__", (0.9, 0.5))  # gamma, lambda
    model = random_model()
    r = next(r for r in groups_of(model) if r.num_tokens < len(r.response))
    critic, r.reward, n = value.ValueModel(model), 1.0, r.num_tokens
    critic.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    line = value.value_advantages(critic, [r], PLAIN, 2)
    rows = all_rows([r], model.config, shrink=2, trained_only=True)
    values, steps = torch.zeros(1, len(r.response)), torch.tensor([value.trace_steps(r, model.config, 2)])
    values[0, [j for _, j in seen(rows)]] = critic(rows, PLAIN).detach()
    rewards = value.place_rewards(torch.ones(1), steps)
    returns, advantages = (x[0] for x in value.returns_and_advantages(rewards, values, steps))
    assert r.returns == pytest.approx(returns.tolist()) and r.advantage == pytest.approx(advantages.tolist())
    assert line["advantage_rms"] == pytest.approx(float(advantages[:n].square().mean().sqrt()))
    assert line["explained_variance"] == pytest.approx(
        value.explained_variance(values[0, :n], returns[:n]), abs=1e-4)


def test_only_matrices_decay_and_all_parameters_have_the_rate():
    model = random_model()
    learner = parallel.make_learner(model, 9.0, (0.9, 0.98), 0.5)
    parallel.set_learning_rate(learner.optimizer, 0.1)
    expected = [p.detach() * (0.95 if p.dim() == 2 else 1) for p in model.parameters()]
    sum(0 * p.sum() for p in model.parameters()).backward()
    learner.optimizer.step()
    for p, q in zip(model.parameters(), expected):
        torch.testing.assert_close(p.detach(), q)
    sum(p.sum() for p in model.parameters()).backward()  # a step of AdamW is about as long as its rate
    before = flat(model)
    parallel.optimizer_step(learner)
    assert (flat(model) - before).abs().max() < 0.5


def test_sharded_layers_compute_in_dtype_and_their_gradients_are_added_up_in_float32(folder):
    def check():
        """On each of two processes, which have different texts."""
        parallel.start_processes("cpu")
        model = random_model()
        parallel.shard(model, model.layers, torch.bfloat16)
        with parallel.unsharded(model) as whole:
            assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
        model(torch.tensor(random_prompts([8], seed=parallel.processes()[0]))).square().sum().backward()
        g = model.layers[0].q_proj.weight.grad.to_local()
        assert g.dtype == torch.float32 and (g != g.bfloat16()).any()  # the sum of two bfloat16 is none

    processes = start_all(check, [], 2)
    assert [finish(process) for process in processes] == [0, 0], Path("output.txt").read_text()


def test_fine_tuning_is_given_its_views_weights_decay_betas_and_development_set(folder, monkeypatch):
    monkeypatch.setitem(tasks.EMBEDDED, "arithmetic", small_task)
    given, asked = [], []
    group = lambda learner: learner.optimizer.param_groups[0]
    monkeypatch.setattr(sft, "train_step", lambda learner, batch, views, is_weighted, compute: given.append(
        (views, is_weighted, group(learner)["betas"], group(learner)["weight_decay"])) or (1.0, 1.0))
    monkeypatch.setattr(Examinee, "evaluate", lambda self, problems, seed: asked.append(
        (self.decoding.max_new_tokens, seed)) or dict(accuracy=0.5))
    for name, more in enumerate((["--weighted"], ["--views=trace"])):
        sft.main(["--steps=1", "--weight_decay=0.3", "--eval_every=1", "--max_new_tokens=24", "--seed=5",
                  f"--name={name}", *more])
    betas = (0.9, 0.98)
    assert given == [(sft.noise_views, True, betas, 0.3), (rollout.trace_views, False, betas, 0.3)]
    assert asked == [(24, 5)] * 2 and sft.parse_args(["--data=sudoku"]).dev_data == "sudoku-dev"


def test_another_seed_of_fine_tuning_has_another_order_and_other_masks():
    marked = [Rollout([3], [number], 1, [1]) for number in range(8)]
    orders, seeds = [], []
    for seed in (0, 1):
        drawn = sft.draw_batch(marked, 0, sft.Recipe(batch_size=8, seed=seed))
        orders.append([r.response[0] for r in drawn])
        seeds += [r.seed for r in drawn]
    assert orders[0] != orders[1] and len(set(seeds)) == 16
    problems, _ = encode_prompts([Problem("12+3=", "15", "5;1;\\boxed{15}")], tiny.tiny_tokenizer())
    assert len(sft.to_examples(problems, tiny.tiny_tokenizer(), random_model().config, 9)) == 1  # 8 and eos


def test_an_autoregressive_model_is_sampled_as_the_flags_say(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=18, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
                 num_attention_heads=4, num_key_value_heads=2)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(  # which flags replace
        eos_token_id=3, do_sample=True, top_k=1, top_p=0.1, temperature=1e-3, repetition_penalty=9.0)))
    model, _ = autoregressive.load(tmp_path, torch.float32)
    assert model.generation_config.eos_token_id == [1, 3] and model.generation_config.repetition_penalty == 1
    prompts = random_prompts([5] * 64) * 2
    ask = lambda **how: [r.response for r in autoregressive.generate(
        model, prompts, [*range(128)], Decoding(max_new_tokens=6, **how))]
    drawn, greedy = ask(), ask(temperature=0.0)
    assert drawn == ask() != greedy and drawn[:64] != drawn[64:]
    assert greedy == ask(temperature=1e-6) == ask(top_k=1) == ask(top_p=1e-6)


def test_every_token_that_ends_a_response_is_known():
    tokenizer = SimpleNamespace(eos_token_id=6, get_vocab=lambda: {"<|eot_id|>": 9, "<|endoftext|>": 7})
    assert checkpoints.find_eos_ids([5], tokenizer) == (9, 5, 6, 7)


def test_every_problem_counts_the_same_and_speed_is_that_of_trained_tokens(folder, monkeypatch):
    assert eval_math.main(["--data=test.jsonl", "--strategy=greedy", "--limit=3"])["greedy"]["n"] == 3
    assert eval_math.accuracy([[1.0], [0.0, 0.0, 0.0]])["accuracy"] == 0.5
    monkeypatch.setattr(eval_math, "time", SimpleNamespace(perf_counter=iter([1.0, 7.0]).__next__))
    answer = lambda model, prompts, *_: [Rollout(p, [8, 1, 1, 1], 2, [1, 2, 2, 2]) for p in prompts]
    one = Examinee(torch.nn.Identity(), tiny.tiny_tokenizer(), Decoding(), PLAIN._replace(generate=answer))
    found = one.evaluate([Problem("2+3=", "5"), Problem("2+3=", "6"), Problem("2+2=", "4")])
    assert (found["n"], found["length"], found["tokens_per_second"], found["tokens_per_step"]) == (3, 2, 1, 2)





def test_the_numbers_of_a_step_are_means_maxima_and_counts():
    update = dict(loss=1.0, kl=2.0, clip_fraction=2, entropy=4.0, ratio_max=9.0, gradient_norm=8.0,
                  trained_tokens=1, skipped_updates=1)
    other = dict.fromkeys(update, 0.0) | dict(trained_tokens=3, skipped_updates=0)
    assert show.step_numbers([update, other], [dict(value_loss=3.0, skipped_updates=1)]) == dict(
        loss=0.25, kl=0.5, clip_fraction=0.5, entropy=1.0, ratio_max=9, gradient_norm=8, trained_tokens=4,
        value_loss=3, skipped_updates=2)
    rollouts = [Rollout([3], [4] * 8, 5, [1, 1, 2, 2, 3, 3, 4, 4]),
                *[Rollout([3], [4] * 4, 4, [1] * 4, is_truncated=True)] * 3]
    assert show.rollout_numbers(rollouts) == dict(reward=0.0, length=4.25, truncated=0.75, tokens_per_step=20 / 7)


@pytest.mark.parametrize("kind, cache", [("sdar", "none"), ("llada", "none"), ("llada", "dual")])
def test_a_slot_takes_the_bytes_that_it_is_counted_with(kind, cache):
    model, config = random_model(kind), random_model(kind).config
    decoder = engine.Decoder(model, Decoding(), 3, 24, cache)
    kept = [*decoder.tables, *((decoder.cache.keys, decoder.cache.values) if decoder.cache else ())]
    size = sum(table.numel() * table.element_size() for table in kept) / 4  # three slots and a spare one
    size += 24 * memory.layer_bytes(config, 4) * config.is_full
    assert memory.slot_bytes(config, 24, 4, decoder.cache is not None) == size


def test_no_more_slots_are_taken_than_there_are_sequences(monkeypatch):
    config = random_model().config
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e9)
    fit = lambda asked: memory.fit_slots(asked, 5, 1e6, config, torch.device("cpu"))
    assert [fit(None), fit(3), fit(9)] == [5, 3, 5]
    monkeypatch.setattr(memory, "most_logits", lambda device: 10)
    assert memory.fit_slots(None, 10**6, 1e6, config, torch.device("cpu")) == 799  # logits are made in chunks


def test_a_plan_counts_processes_models_and_the_copy_that_decodes(monkeypatch):
    config = checkpoints.read_config(dict(
        model_type="sdar", vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32,
        head_dim=128, num_key_value_heads=8, intermediate_size=9728, tie_word_embeddings=False))

    def plan(gib, number, num_models=1, *more):
        """Tokens of a micro-batch on so many processes."""
        monkeypatch.setattr(parallel, "processes", lambda: (0, number))
        monkeypatch.setattr(memory.dist, "is_initialized", lambda: number > 1)
        monkeypatch.setattr(parallel, "is_first", lambda: True)
        monkeypatch.setattr(memory, "free_bytes", lambda device: gib * 2**30)
        args = ["--model=x", "--train_data=a", "--eval_data=b", "--dtype=bfloat16", *more]
        return memory.plan(checkpoints.empty_model(config), tracerl.parse_args(args), num_models)

    assert plan(99, 1) == 16384 and plan(99, 1, 1, "--plain") == 2048 and plan(20, 8) > 1024
    for gib, number, num_models in ((99, 1, 2), (10, 64, 1)):  # two models; a copy of the whole weights
        with pytest.raises(ValueError, match="training needs"):
            plan(gib, number, num_models)


def test_a_run_saves_in_its_dtype_and_without_a_checkpoint_its_log_begins_again(folder):
    learners = [parallel.make_learner(model, 0.1, (0.9, 0.95))
                for model in (random_model(), value.ValueModel(random_model()))]
    with runs.Run("r", dict(dtype="bfloat16")) as run:
        run.begin()
        run.write(dict(step=1))
        run.restore(learners)
        assert run.lines() == []
        run.save(learners)
        run.save_model(learners[0].model)
    saved = [load_file(path) for path in Path("runs/r").rglob("*.safetensors")]
    assert len(saved) == 3 and {p.dtype for state in saved for p in state.values()} == {torch.bfloat16}


def test_a_function_with_others_is_given_all_that_there_is(tmp_path):
    everything = lambda **others: others["entropy"] < 1
    assert flags.declares(everything, "entropy") and not flags.declares(lambda confidence: 0, "entropy")
    (tmp_path / "mine.py").write_text(
        "def surest(is_masked, **others):\n"
        "    least = others['entropy'].masked_fill(~is_masked, 99).min(-1, keepdim=True).values\n"
        "    return others['entropy'] == least\n")
    runs_of = [decode(random_model(), [[3, 4, 5]], compute, strategy=f"{tmp_path}/mine.py:surest",
                      max_new_tokens=12) for compute in (PLAIN, FAST)]
    assert runs_of[0][0].step_map == runs_of[1][0].step_map and max(runs_of[0][0].step_map) >= 12


def test_a_run_goes_on_although_a_flag_has_come_or_gone_since():
    flags.check_same(dict(lr=1.0, debug=False), dict(lr=1.0, wandb=False), set(), "args.json")
    with pytest.raises(ValueError, match="lr was 1.0, is 2.0"):
        flags.check_same(dict(lr=1.0, debug=False), dict(lr=2.0), set(), "args.json")


def test_what_fails_inside_of_torchs_checkpoints_is_named(tmp_path):
    torch.distributed.checkpoint.save(dict(one=torch.ones(2)), checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="Missing key.*other"):
        parallel.load(dict(other=torch.ones(2)), checkpoint_id=tmp_path)


def test_a_run_does_not_go_on_with_other_functions_than_those_it_began_with(folder):
    Path("mine.py").write_text("def first(is_masked, quota):\n    return is_masked\n")
    ask = ["--model", str(FIXTURES / "tiny"), "--data=test.jsonl", "--strategy=mine.py:first", "--name=e"]
    eval_math.main([*ask, "--limit=2"])
    eval_math.main([*ask, "--limit=2", "--samples=2"])
    Path("mine.py").write_text("def first(is_masked, quota):\n    return is_masked & True\n")
    with pytest.raises(ValueError, match="the text of mine.py was '.*', is '"):
        eval_math.main([*ask, "--limit=2", "--samples=3"])


def test_the_definitions_take_no_approximate_cache(folder):
    with pytest.raises(ValueError, match="the definitions know no --cache dual"):
        eval_math.main(["--attention=full", "--data=test.jsonl", "--limit=1", "--plain", "--cache=dual"])


def test_a_reward_of_ones_own_may_use_signals():
    import signal
    alarm = lambda: float(signal.signal(signal.SIGALRM, signal.SIG_DFL) is not None)
    r = Rollout([3], [4, 1], 2, [1, 2])
    eval_math.give_rewards([r], [Problem("", "")], tiny.tiny_tokenizer(), alarm)
    assert r.reward == 1


def test_a_new_tiny_model_takes_no_flags_of_checkpoints(folder):
    for flag in ("--lora_rank=2", "--gradient_checkpointing", "--dtype=bfloat16"):
        with pytest.raises(ValueError, match="need a checkpoint: give --model"):
            sft.main([flag, "--steps=1", "--name=s"])
        parallel.end_processes()  # bfloat16 has made a group of one
    with pytest.raises(ValueError, match="no file 'nofile.py'"):
        sft.main(["--views=nofile.py:f", "--steps=1", "--name=s"])
    assert not os.path.exists("runs/s/args.json")


def test_an_update_without_a_target_leaves_the_weights():
    learner = parallel.make_learner(random_model(), 0.1, (0.9, 0.95), weight_decay=0.5)
    before = flat(learner.model)
    loss, _ = sft.train_step(learner, examples()[:2], lambda block: [], False, PLAIN)
    assert loss == 0 and torch.equal(flat(learner.model), before)


def test_equal_rewards_teach_nothing_without_a_group_either():
    from examples import forks
    assert not forks.minus_step_mean(torch.full((4, 4), 85.3)).any()


def test_long_names_of_strategies_stand_apart(capsys):
    show.print_columns({"examples/strategy.py:falling": dict(accuracy=0.5), "greedy": dict(accuracy=None)})
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["examples/strategy.py:falling", "greedy"] and len(head) == len(line)


def test_adapters_are_not_put_on_other_weights(folder):
    model = random_model()
    checkpoints.save_checkpoint(model, tiny.tiny_tokenizer(), "base")
    tracerl.main([*SMALL, "--model=base", "--lora_rank=2", "--steps=1", "--name=r"])
    with torch.no_grad():
        model.layers[0].q_proj.weight += 0.1
    checkpoints.save_checkpoint(model, tiny.tiny_tokenizer(), "base")
    with pytest.raises(ValueError, match="holds adapters for other weights"):
        tracerl.main(["--resume", "--name=r", "--steps=2", *SMALL, "--model=base", "--lora_rank=2"])


def test_a_resumed_run_does_not_need_the_checkpoint_it_began_from(folder):
    checkpoints.save_checkpoint(random_model(), tiny.tiny_tokenizer(), "base")
    tracerl.main([*SMALL, "--model=base", "--steps=1", "--name=r"])
    os.rename("base", "elsewhere")
    tracerl.main(["--resume", "--name=r", "--steps=2"])
    assert len(Path("runs/r/metrics.jsonl").read_text().splitlines()) == 2


def test_solutions_lose_what_is_added_anyway_and_hold_nothing_that_cannot_be_learnt():
    ids = {"a": 3, "b": 4, "<eos>": 1, "<mask>": 2, "<think>": 5, "\n": 6}
    names = {number: text for text, number in ids.items()}

    def cut(texts, add_special_tokens):
        found = [[ids[piece] for piece in re.findall(r"<\w+>|[\s\S]", text)] for text in texts]
        return SimpleNamespace(input_ids=found)

    class Cutter(SimpleNamespace):
        __call__ = staticmethod(cut)

    tokenizer = Cutter(unk_token_id=None, decode=lambda tokens: "".join(names[t] for t in tokens),
                       convert_ids_to_tokens=lambda tokens: [names[t] for t in tokens])
    config = SimpleNamespace(eos_ids=(1,), mask_id=2, vocab_size=6)
    solve = lambda text, prompt=(3,): prompts.encode_solutions(
        [Problem("q", "", text, tokens=list(prompt))], tokenizer, config)
    assert solve("ab") == solve("ab<eos>") == solve("ab<eos>\n<eos>\n") == [[3, 4]]
    assert solve("<think>ab", (3, 5)) == [[3, 4]] and solve("<think>ab") == [[5, 3, 4]]
    traced = Problem("q", "", "ab<eos>", step_map=[2, 1, 3], tokens=[3])
    assert prompts.encode_solutions([traced], tokenizer, config) == [[3, 4]] and traced.step_map == [2, 1]
    for text, reason in (("a<eos>b", "an eos before its end"), ("a<mask>", "the mask token"),
                         ("a\nb", "token id 6, outside the vocabulary of 6")):
        with pytest.raises(ValueError, match=reason):
            solve(text)
    with pytest.raises(ValueError, match="half of a character"):
        prompts.encode(["a \ud83d b"], tokenizer)


def test_a_copied_calculation_is_no_answer():
    r = Rollout([3], [4, 1], 2, [1, 2])
    reward = lambda question, answer, gold: eval_math.math_reward(
        Problem(question, gold), f"\\boxed{{{answer}}}", r)
    assert reward("894+396=", "894+396", "1290") == 0 and reward("What is 48 + 48/2?", "48+48/2", "72") == 0
    assert reward("894+396=", "1290", "1290") == 1 and reward("Tom has 12 apples.", "12 apples", "12") == 1
    assert reward("Write 0.5 as a fraction, like 1/2.", "1/2", "\\frac12") == 1
    assert reward("P(A)=1/2. And P(not A)?", "1/2", "0.5") == 1
    assert reward("A square of 36\\text{ cm}^2 is", "36\\text{ cm}^2", "36") == 1
    assert reward([dict(role="user", content="2 \\times 3?")], "2 \\times 3", "6") == 0
    assert reward("894+396=", "(894+396)", "1290") == reward("894+396=", "894+396", "1,290") == 0


def test_chats_are_read_from_texts_and_nothing_of_them_is_lost():
    read = lambda **row: data.read_fields(row, "x", needs_answer=False)
    chat = [dict(role="user", content="1+1?"), dict(role="assistant", content="\\boxed{2}")]
    assert read(messages=json.dumps(chat)) == read(messages=chat)
    assert read(problem="1+1?", completion=chat)["solution"] == "\\boxed{2}"
    thought = read(messages=[chat[0], chat[1] | dict(reasoning_content="hm")])
    assert thought["solution"] == "<think>\nhm\n</think>\n\n\\boxed{2}"
    for text in ('[{"from": "A", "to": "B"}]\nFind the path', '[{"value": 3}, {"value": 4}] What is the sum?'):
        assert read(problem=text)["problem"] == text


def test_names_that_are_no_folder_under_runs_are_refused(folder):
    for name in ("", "..", "a/../.."):
        with pytest.raises(ValueError, match="no name of a folder under runs/"):
            runs.Run(name, {})


def test_a_rope_type_in_either_field_is_refused():
    source = random_model().config.source | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
    with pytest.raises(ValueError, match="rope type 'yarn'"):
        checkpoints.read_config(source | dict(rope_scaling=dict(rope_type="yarn", factor=4.0)))


def test_a_run_of_one_script_is_not_gone_on_with_by_another(folder):
    with runs.Run("z", dict(model="m", lr=0.1), groups=sft.GROUPS) as run:
        run.begin()
    for log, groups in (("responses.jsonl", eval_math.GROUPS), ("metrics.jsonl", tracerl.GROUPS)):
        with pytest.raises(ValueError, match="kind_of_run was 'lesson'"):
            runs.Run("z", dict(model="m"), resume=True, groups=groups, log=log)


def test_what_a_partial_fixes_stays_and_a_function_may_be_any_object(tmp_path):
    given = functools.partial(lambda a, clip_eps: (a, clip_eps), clip_eps=0.3)
    assert flags.call(given, a=1, clip_eps=0.2) == (1, 0.3)

    @dataclasses.dataclass
    class Penalty:  # an object without a hash
        weight: float = 0.5

        def __call__(self, text):
            return self.weight * len(text)

    assert flags.call(Penalty(), text="ab", tokens=[1]) == 1.0 and flags.declares(Penalty(), "text")


def test_a_strategy_gives_bools_of_the_blocks_shape(tmp_path):
    (tmp_path / "mine.py").write_text("def all(is_masked):\n    return is_masked.all(-1)\n\n"
                                      "def long(is_masked):\n    return is_masked.long()\n\n"
                                      "def one(is_masked):\n    return True\n")
    for name, found in (("all", r"tensor"), ("long", r"tensor"), ("one", "True")):
        for compute in (PLAIN, FAST):
            with pytest.raises(ValueError, match=f"--strategy gives {found}"):
                decode(random_model(), [[3, 4, 5]], compute, strategy=f"{tmp_path}/mine.py:{name}")


def test_chats_that_pandas_wrote_and_answers_for_a_reward_of_ones_own_are_read_as_always():
    chat = "[{'role': 'user', 'content': '1+1='}, {'role': 'assistant', 'content': '2'}]"
    for text in (chat, " " + chat.replace("'", '"')):
        row = data.read_fields(dict(messages=text, answer="2"), "a row", True)
        assert row["problem"] == [dict(role="user", content="1+1=")] and row["solution"] == "2"
    for needs_answer in (True, False):
        read = lambda cell: data.read_fields(dict(problem="p", answer=cell), "a row", needs_answer)["answer"]
        assert read("['782']") == "782"
    for tests in (['assert f("a") == 1\nassert f("b") == 2'], ["assert f(1) == 2", "assert f(2) == 3"]):
        assert json.loads(read(tests)) == json.loads(read(json.dumps(tests))) == tests
    assert data.read_fields(dict(problem="[{[1]: 2}]", answer="2"), "a row", True)["problem"] == "[{[1]: 2}]"


def test_advantages_of_the_size_of_rounding_train_nothing():
    """Leave-one-out of equal rewards: 1/3 minus the mean of the others."""
    rollouts = groups_of(random_model(), num_groups=2, group_size=8)
    for r, reward in zip(rollouts, [1 / 3] * 8 + [0.0] * 4 + [1.0] * 4):
        r.reward = reward
    others = lambda rewards: rewards - (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    for scale in (1, 1e7):
        for r in rollouts:
            r.reward *= scale
        kept, line = tracerl.give_advantages(
            rollouts, None, method_of(advantage=others), recipe_of(group_size=8))
        assert line["kept_groups"] == 1 and kept == rollouts[8:]
        assert keep(rollouts, group_size=8) == rollouts[8:]


def test_a_loss_that_asks_for_groups_is_warned_once_when_it_gets_parts(capsys, monkeypatch):
    monkeypatch.setattr(packing, "WARNED", [])
    model = random_model()
    rows = rollout.build_rows(groups_of(model, num_groups=1), model.config)
    unit = [row for rows in rows for row in rows]
    size = max(len(row.tokens) for row in unit) * len(unit)
    groups = lambda num_groups: 0
    for max_tokens, loss, is_warned in ((size, groups, False), (size - 1, lambda **others: 0, True),
                                        (size - 1, groups, True), (size - 1, groups, False)):
        packing.dealt_batches([unit], PLAIN._replace(max_tokens=max_tokens), model, loss)
        assert (f"has {size} tokens" in capsys.readouterr().out) == is_warned


def test_a_padding_token_outside_the_vocabulary_and_a_missing_eos(tmp_path, capsys):
    checkpoints.save_checkpoint(random_model(), None, tmp_path)
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(pad_token_id=-1, eos_token_id=[])))
    _, config, _ = checkpoints.find_checkpoint(tmp_path)
    assert config.pad_id == 0 and "names no eos token" in capsys.readouterr().out


def test_a_wrong_name_among_the_eval_strategies_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--eval_strategies sttaic: no file 'sttaic'.* greedy"):
        tracerl.main(["--model=nowhere", "--train_data=arithmetic", "--eval_strategies", "dynamic", "sttaic"])
