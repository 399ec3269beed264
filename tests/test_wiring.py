"""What is handed on: arguments, seeds, defaults and files reach the place where they count.

Each test fails after a one-line change somewhere between a flag and its use, which no other test saw.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import FAST, FIXTURES, PLAIN, all_rows, decode, random_model, random_prompts, small_data
from test_engine import check_same
from test_sft import examples
from test_tracerl import DECODING, flat, groups_of, keep, learners_of, method_of, one_update, recipe_of

import eval_math
import model as lm
import rollout
import sft
import tracerl
import value
from eval_math import Examinee, Problem
from plumbing import check, checkpoints, data, memory, parallel, runs, tasks, tiny
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


def test_the_loop_hands_on_gamma_lambda_and_shrink():
    model = random_model()
    rollouts = groups_of(model)
    learner = parallel.Learner(value.ValueModel(model), None)
    learner.model.value_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    value.value_advantages(learner.model, rollouts, FAST, 2, 0.9, 0.5)
    expected = [r.advantage for r in rollouts]
    tracerl.give_advantages(rollouts, learner, method_of(), recipe_of(gamma=0.9, gae_lambda=0.5, shrink=2))
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
    assert "The traces replay." in capsys.readouterr().out


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
