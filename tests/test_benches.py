"""The benches run, and write what they promise. Most of this is slow: SLOW=1 pytest tests/test_benches.py"""

import json
import os
import re
import shlex

import pytest
import torch
from conftest import FAST, FIXTURES, ROOT, decode, random_model, random_prompts, small_data

import bench_broken
import bench_methods
import bench_questions
import bench_rollout
import bench_update
import cross_compile
import tracerl
from plumbing import parallel, runs
from rollout import Decoding
from value import ValueModel

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes a minute: SLOW=1")
TINY = str(FIXTURES / "tiny")


def small_runs(folder):
    """Flags of bench_methods for the smallest runs."""
    words = ["--model", TINY, *small_data(folder), "--dev_data=test.jsonl", "--prompts=4", "--group_size=4",
             "--keep_range", "0", "1", "--max_new_tokens=20", "--tokens_per_micro_batch=2048",
             "--value_warmup=0"]
    return [*(f"--more={word}" for word in words), "--settings", "k4", "--steps=1", "--seeds=2"]


@slow
def test_the_comparison_of_methods_runs_and_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    flags = [*small_runs(tmp_path), "--lrs", "1e-3", "1e-4", "--arms", "tracerl", "coupled", "dr-grpo"]
    tables = bench_methods.main(flags)
    assert set(tables["k4"]) == {"tracerl", "coupled", "dr-grpo"}
    for lr, results in tables["k4"].values():
        assert lr in ("1e-3", "1e-4") and len(results) == 2 and all(0 <= r["dynamic"] <= 1 for r in results)
    assert json.loads((tmp_path / "runs/methods.json").read_text()).keys() == {"k4"}
    output = capsys.readouterr().out
    assert "--views=coupled --lr=1e-3" in output and "| coupled | 1e-" in output
    assert bench_methods.main(flags) == tables  # all of it is there: nothing runs again
    assert "python tracerl.py" not in capsys.readouterr().out


@slow
def test_every_arm_is_a_command_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    args = bench_methods.parse_args(small_runs(tmp_path))
    arms = [arm for arm in bench_methods.ARMS if arm != "rejection"]
    trials = [bench_methods.Trial("k4", arm, "1e-4", 0, 1) for arm in arms]
    results = bench_methods.run_all(trials, args)
    assert all(result["seconds"] > 0 and result["before"] == results[0]["before"]
               for arm, result in zip(arms, results) if arm not in ("static", "just-grpo"))


@slow
def test_equal_seconds_bring_in_rejection_sampling(tmp_path, monkeypatch, capsys):
    """It samples and learns for as long as the first arm trains, and starts where all arms start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    flags = [*small_runs(tmp_path), "--lrs", "1e-4", "--equal_seconds", "--arms", "tracerl", "rejection"]
    tables = bench_methods.main(flags)
    assert set(tables["k4"]) == {"tracerl"}
    table = tables["k4, equal seconds"]
    assert list(table) == ["tracerl", "rejection"]
    _, first = table["tracerl"]
    _, rejection = table["rejection"]
    assert [r["before"] for r in rejection] == [r["before"] for r in first]
    assert all(0 < r["reward"] < 1 and r["seconds"] > 0 for r in rejection)
    assert "rejection, k4, seed 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_methods.main(["--arms", "tracerl", "rejection"])


@slow
def test_starts_are_made_once_for_each_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    made = []
    usual = bench_methods.sft.main

    def short(words):
        made.append(words)
        return usual([*words, "--steps=2", "--cooldown=1"])

    monkeypatch.setattr(bench_methods.sft, "main", short)
    _, problems = small_data(tmp_path)
    more = [problems, problems.replace("eval", "dev"), "--prompts=2", "--group_size=2"]
    args = bench_methods.parse_args([f"--more={word}" for word in more])
    for arm in ("tracerl", "random"):
        bench_methods.run_all([bench_methods.Trial("full", arm, "1e-4", 0, 1)], args)
    words, = made
    assert {"--data=arithmetic", "--attention=full", "--stop_accuracy=0.2", "--lr=0.002",
            "--seed=0"} <= {*words}


@slow
def test_the_noise_of_every_estimator_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*small_runs(tmp_path), "--variance", "--resamples=3", "--value_steps=1"]
    table = bench_methods.main(flags)["k4"]
    assert set(table) == {"group", "batch", "raw", "value", "random", "as-many-random", "coupled"}
    assert table["raw"][2] == pytest.approx(1, abs=1e-4)
    assert all(abs(cosine) < 1.0001 for *_, cosine in table.values())


def test_the_evidence_can_be_shown_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench_methods.main(["--show", "--out", str(ROOT / "tests/evidence.json"), "--picture=q.png"])
    output = capsys.readouterr().out
    assert "sudoku-full, 5 seeds" in output and "| random | -0.091 +- 0.108 |" in output
    assert (tmp_path / "q.png").is_file()


def test_the_noise_of_a_gradient_is_its_variance_over_its_squared_mean():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((1000,), 0.1)
    ratio, error = bench_methods.noise(list(mean + torch.randn(64, 1000, generator=generator)))
    assert ratio == pytest.approx(1000 / 10, rel=0.15) and 0 < error < 15


@pytest.mark.parametrize("layout", bench_update.LAYOUTS)
def test_the_cost_of_an_update_can_be_measured_in_every_layout(layout, capsys):
    bench_update.main(["--measures=update", "--preset=tiny", f"--layout={layout}", "--responses=2",
                       "--repeats=1", "--threads=1", "--range", "8", "16", "--padded=16", "--prompt=8"])
    assert json.loads(capsys.readouterr().out)["trained"] == 24


@slow
def test_decoding_is_measured_beside_both_loops_and_the_limit(capsys):
    bench_rollout.main(["--quick", "--preset=tiny", "--batches", "1", "3", "--prompt_tokens=9",
                        "--max_new_tokens=12", "--threads=1"])
    output = capsys.readouterr().out
    for text in ("transformers", "definition", "engine     3", "of the limit", "rollout", "update"):
        assert text in output


def test_the_seconds_of_an_update_hold_the_forwards_of_the_value_model():
    """Else the value arm looks cheaper than it is."""
    model = random_model()
    rollouts = decode(model, random_prompts([5, 6]), max_new_tokens=8)
    learner = parallel.make_learner(ValueModel(model), 1e-3, (0.9, 0.999))
    method = tracerl.Method(None, None, None, None, Decoding(), FAST, None)
    runs.take_seconds()
    tracerl.give_advantages(rollouts, learner, method, tracerl.Recipe(group_size=1, shrink=1))
    assert runs.take_seconds()["update_seconds"] > 0


def test_the_cost_of_broken_replays_is_shown_from_what_ran(tmp_path, capsys):
    numbers = lambda gap, after: dict(gap=gap, gap_max=2 * gap, accuracy=[0.5, after], reward=[0.4, after])
    known = {"k4": {"1": {"padded": {"0": numbers(3.0, 0.5)}},
                    "30": {"none": {"0": numbers(1e-7, 0.9), "1": numbers(1e-7, 0.8)},
                           "padded": {"0": numbers(1.0, 0.7), "1": numbers(2.0, 0.6),
                                      "2": numbers(2.0, 0.1)}}}}  # no control has this seed
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(known))
    bench_broken.main(["--show", "--out", str(path)])
    output = capsys.readouterr().out
    assert "| padded | 2.0e+00, 6.0e+00 |" in output and "| none | 0.500 -> 0.850 |" in output
    assert output.count("| padded | **-0.200 +- 0.000** |") == 2  # accuracy and reward
    assert "1 steps" not in output


def test_every_run_of_the_three_questions_is_a_command_of_this_project(monkeypatch):
    monkeypatch.setattr(bench_questions, "start_of", lambda setting: TINY)
    names = set()
    for question, arms in bench_questions.ARMS.items():
        for arm in [arm for arm in arms if arm != "start"]:
            trial = bench_questions.Trial(question, bench_questions.SETTINGS[question][0], arm, 3)
            script, *words = bench_questions.command_of(trial)
            if script == "examples/broken.py":
                assert words.pop(0) in bench_broken.FAULTS
            args = tracerl.parse_args(words)
            # Each arm makes as many updates of the policy, on as many rollouts.
            head_start = args.value_warmup if args.advantage == "value" else 0
            assert args.steps - head_start == (100 if question == "large" else 30)
            assert args.prompts * args.group_size == (256 if question == "values" else 512)
            names.add(args.name)
    assert len(names) == sum(map(len, bench_questions.ARMS.values())) - 1  # no two share a folder


def test_the_answers_to_the_three_questions_are_shown_from_what_ran(tmp_path, capsys):
    scores = lambda x: dict(accuracy=x, pass_at_4=x, pass_at_16=x)
    orders = lambda x, y: {"0": dict(dynamic=scores(x), sequential=scores(y)),
                           "1": dict(dynamic=scores(x), sequential=scores(y))}
    run = lambda x: dict(before=0.5, accuracy=x, gap_max=1e-6, curve=[], lowest=0.4, reward=0.6, jump=0.01,
                         explained=None, seconds=0.5)
    known = dict(order={"k4": dict(start=orders(0.5, 0.4), dynamic=orders(0.9, 0.7),
                                   sequential=orders(0.8, 0.8))},
                 large={"large-k16": {"tracerl": {"0": run(0.9), "1": run(0.7)},
                                      "shrink 4": {"0": run(0.8), "1": run(0.6)}}})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(known))
    bench_questions.main(["order", "--show", "--out", str(path)])
    output = capsys.readouterr().out
    assert "| sequential | dynamic | 0.800 +- 0.000 |" in output and "**+0.300 +- 0.000** |" in output
    assert "| left to right minus by confidence | sequential | **+0.100 +- 0.000** |" in output
    bench_questions.main(["large", "--show", "--out", str(path)])
    assert "| **-0.100 +- 0.000** | 0.600 +- 0.000 |" in capsys.readouterr().out


def test_the_bench_commands_of_the_evidence_are_understood():
    benches = dict(bench_broken=bench_broken, bench_methods=bench_methods, bench_questions=bench_questions,
                   bench_rollout=bench_rollout, cross_compile=cross_compile)
    found = set()
    for line in (ROOT / "tests/EVIDENCE.md").read_text().splitlines():
        if line.startswith("    python tests/"):
            command, _, _ = line.partition("  #")
            _, path, *words = shlex.split(command)
            # "..." and "S" stand for some setting or arm.
            known = {"--settings": "k4", "--arms": "tracerl"}
            words = [known[before] if word in ("...", "S") else word
                     for before, word in zip(["", *words], words)]
            name = path.removeprefix("tests/").removesuffix(".py")
            benches[name].parse_args(words)
            found.add(name)
    assert found == set(benches)


@pytest.mark.parametrize("name", ["README.md", "tests/EVIDENCE.md"])
def test_links_inside_of_a_text_have_a_target(name):
    text = (ROOT / name).read_text()
    plain = lambda title: re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
    targets = {plain(title) for title in re.findall(r"(?m)^#+ (.*)$", text)}
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links and set(links) <= targets


def test_the_evidence_tells_only_what_the_results_say(capsys):
    """Each mean, difference and interval in these sections' tables is printed from the JSON file."""
    show = {
        "What a broken replay costs": [bench_broken, "--show"],
        "The order of decoding": [bench_questions, "order", "--show"],
        "Exact replay in large blocks": [bench_questions, "large", "--show"],
        "After equally many steps": [bench_methods, "--show", "--out", str(bench_methods.EVIDENCE)],
        "After equal seconds": [bench_methods, "--show", "--out", str(bench_methods.EVIDENCE)],
        "Beside fine-tuning on right answers alone":
            [bench_methods, "--show", "--out", str(ROOT / "tests/rejection.json")]}
    text = (ROOT / "tests/EVIDENCE.md").read_text()
    _, *parts = re.split(r"(?m)^###? (.*)$", text)
    sections = dict(zip(parts[::2], parts[1::2]))
    for title, (bench, *flags) in show.items():
        bench.main(flags)
        printed = capsys.readouterr().out
        table = "\n".join(line for line in sections[title].splitlines() if line.startswith("|"))
        cells = set(re.findall(r"[+-]?\d\.\d+ \+- \d\.\d+|\d\.\d+ -> \d\.\d+", table))
        assert len(cells) >= 10 and not [cell for cell in cells if cell not in printed], title
