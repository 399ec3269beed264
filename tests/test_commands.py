"""The commands of the README, run as a person would run them."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, small_data
from torch.distributed.tensor import DTensor

import eval_math
import sft
import tracerl
from plumbing import checkpoints, machine, parallel, player, runs, tasks, tiny

TINY = str(FIXTURES / "tiny")
FORKS = str(ROOT / "examples/forks.py")
SMALL = ["--model", TINY, "--train_data=train.jsonl", "--eval_data=test.jsonl", "--steps=2", "--prompts=4",
         "--group_size=4", "--lr=1e-3", "--warmup=0", "--value_epochs=1", "--eval_every=0",
         "--eval_strategies=dynamic", "--eval_limit=2"]
COMMANDS = dict(tracerl=tracerl, sft=sft, eval_math=eval_math, rollout=player)
PLOT = runs.Run.plot


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with small data, and no curves: they take a second for each checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    small_data(tmp_path)
    return tmp_path


def metrics(name="tracerl"):
    """The lines of a run's log."""
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def explained(names):
    """Whether the README explains all these metrics; names the others."""
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in names if f"`{name}`" not in readme]
    assert not missing, f"the README does not explain {missing}"
    return True


def save_tiny(path, attention="block"):
    """Saves an untrained tiny model."""
    checkpoints.save_checkpoint(tiny.tiny_model(attention=attention), tiny.tiny_tokenizer(), path)


# ------------------------------------------------------------------------------------------------------------
# What the README says.


def test_the_readme_gives_the_install_and_main_commands():
    readme = (ROOT / "README.md").read_text()
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert install + "torchrun tracerl.py\n" in readme and install + "pytest\n" in readme


def commands():
    """Every command of the READMEs, the six files and examples/ -> list of (script, flags, is only parsed).

    Only parsed: what needs a GPU, or a model or data from the hub; and examples/, which has its own tests.
    """
    found = {}
    files = [ROOT / "README.md", ROOT / "assets/README.md", ROOT / "model.py", ROOT / "value.py",
             *(ROOT / f"{name}.py" for name in COMMANDS), *sorted(ROOT.glob("examples/*.py"))]
    for file in files:
        text = re.sub(r"\\\n", " ", file.read_text())  # a command may go on in the next line
        for line in text.splitlines():
            command, _, comment = line.partition("  #")
            match = re.match(r" *(?:\w+=\S+ )?(?:torchrun|python) (?:--\S+ )*(\w+)\.py( .*|)$", command)
            if match and match[1] in COMMANDS:
                flags = shlex.split(match[2])
                model = flags[flags.index("--model") + 1] if "--model" in flags else "runs/"
                is_local = model.startswith("runs/") and file.parent.name != "examples"
                found[match[1], *flags] = (match[1], flags, "GPU" in comment or not is_local)
    return list(found.values())


class Understood(Exception):
    """A command has read its flags, and begins."""


def begin(*_, **__):
    """In place of parallel.start_processes."""
    raise Understood


def test_every_command_of_the_readme_and_the_docstrings_is_understood_and_runs(folder, monkeypatch):
    """In a small way: one step, few problems, an untrained model."""
    for name, whole in list(tasks.EMBEDDED.items()):
        monkeypatch.setitem(tasks.EMBEDDED, name, lambda split, number, *more, whole=whole: whole(
            split, min(number, 30), *more))
    for attention in ("block", "full"):
        save_tiny(f"start/{attention}", attention)
    monkeypatch.setattr(machine, "start_of", lambda attention: f"start/{attention or 'block'}")
    os.symlink(ROOT / "examples", "examples")
    Path("answers.jsonl").write_text('{"gold": "5", "response": "\\\\boxed{5}"}\n')
    ran = set()
    for script, flags, is_only_parsed in commands():
        main = COMMANDS[script].main
        if is_only_parsed:
            with monkeypatch.context() as patch, pytest.raises(Understood):
                patch.setattr(parallel, "start_processes", begin)
                main(flags)
            continue
        ran.add(script)
        model = flags[flags.index("--model") + 1] if "--model" in flags else None
        if model and not os.path.isdir(model):  # of a run that somebody else has made
            save_tiny(model)
        if script in ("tracerl", "sft") and "--resume" not in flags:  # some commands share a name
            shutil.rmtree(f"runs/{COMMANDS[script].parse_args(flags).name}", ignore_errors=True)
        if script == "tracerl" and "--resume" in flags:
            main([*flags, "--steps=2"])
        elif script == "tracerl":
            main([*flags, "--steps=1", "--prompts=2", "--group_size=2", "--eval_every=0", "--eval_limit=2",
                  "--max_new_tokens=8"])
        elif script == "sft":
            main([*flags, "--steps=1", "--batch_size=8", "--eval_every=1"])
        elif script == "eval_math" and "--grade" not in flags:
            main([*flags, "--limit=2", "--max_new_tokens=8"])
        else:
            main(flags)
    assert ran == set(COMMANDS)


@pytest.mark.parametrize("attention", ["block", "full"])
def test_a_run_without_a_model_starts_from_the_one_in_assets(attention, folder):
    r, model, _ = player.main([f"--attention={attention}", "--prompt=12+34="])
    assert model.config.is_full == (attention == "full") and not r.is_truncated
    args = tracerl.parse_args(["--attention", attention])
    assert args.steps == 45 and args.train_data == "arithmetic" and args.dtype == "float32"


def test_a_run_leaves_behind_what_the_readme_says(folder, monkeypatch, capsys):
    monkeypatch.setattr(runs.Run, "plot", PLOT)
    few = tasks.arithmetic("test", 30)
    Path("test.jsonl").write_text("\n".join(map(json.dumps, few)))
    tracerl.main(["--model", TINY, "--train_data=train.jsonl", "--eval_data=test.jsonl",
                  "--dev_data=test.jsonl", "--steps=2", "--eval_every=2", "--prompts=4", "--group_size=4"])
    assert {path.name for path in Path("runs/tracerl").iterdir()} - {"lock"} == {
        "args.json", "checkpoints", "curves.png", "metrics.jsonl", "summary.json", "trace.html"}
    assert Path("runs/tracerl/curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(Path("runs/tracerl/summary.json").read_text())
    assert set(summary) == {"before", "after", "seed", "replay_gap_max"}
    for part in (summary["before"], summary["after"]):
        assert set(part) == {"dynamic", "static", "greedy"}
        assert all(found["n"] == 30 and found["standard_error"] is not None for found in part.values())
    assert 0.3 < summary["before"]["dynamic"]["accuracy"] < 0.75 and summary["replay_gap_max"] < 1e-4
    assert summary["before"]["static"]["tokens_per_step"] == 1
    said = capsys.readouterr().out
    assert "before" in said and "+-" in said and "step   2  reward" in said and "dev_accuracy" in said
    assert "dev_accuracy" in metrics()[1] and explained(metrics()[1])


# ------------------------------------------------------------------------------------------------------------
# Variants of the method, and how it is computed.

NEIGHBOUR = """
def share(tokens):
    return float(len(set(tokens)) % 3)
"""
MINE = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from neighbour import share

def pooled(tokens):
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(share, tokens).result()

def inner(tokens):
    return share(tokens)

def own_pool(problem, text, tokens, rollout):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(inner, tokens).result()

def each(tokens):
    return [float(token % 2) for token in tokens]

def centered(rewards):
    return rewards - rewards.mean(-1, keepdim=True)

def per_group(logp, targets, num_groups, rl_step):
    assert rl_step in (1, 2)  # a run of two RL steps
    return -(targets.advantage * logp).sum() / num_groups

def whole_block(block):
    return [(block, block)]

def leftmost(is_masked, quota):
    return is_masked & (is_masked.cumsum(-1) <= quota[:, None])
"""


@pytest.mark.parametrize("flags", [
    # A value model, with process rewards.
    ["--advantage=value", "--value_warmup=1", "--reward=mine.py:each"],
    # Every function of one's own. The reward has a pool of processes, and imports a file beside it.
    ["--reward=mine.py:own_pool", "--advantage=mine.py:centered", "--loss=mine.py:per_group",
     "--views=mine.py:whole_block", "--strategy=mine.py:leftmost", "--prompts=2"],
    # Baselines, larger blocks, another policy.
    [f"--advantage={FORKS}:minus_step_mean", "--views=coupled", "--reward=mine.py:share", "--strategy=static",
     "--denoising_steps=3", "--temperature=0.8", "--top_k=9", "--block_size=8", "--epochs=2"],
    # Full attention, merged trace steps.
    ["--model=full", "--attention=full", f"--advantage={FORKS}:raw", "--reward=mine.py:share", "--shrink=2",
     "--max_new_tokens=8"],
], ids=["value", "plug-ins", "baselines", "full"])
def test_every_variant_runs_and_its_checkpoint_is_the_policy(flags, folder, monkeypatch):
    """Two RL steps by `main`: what was sampled is replayed, the policy moves, and what was saved loads."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/neighbour.py").write_text(NEIGHBOUR)
    (folder / "elsewhere/mine.py").write_text(MINE)
    flags = [flag.replace("mine.py", "elsewhere/mine.py") for flag in flags]
    save_tiny("full", "full")
    trained = []
    train = tracerl.train
    monkeypatch.setattr(tracerl, "train", lambda learners, *rest: (
        trained.append(learners.policy.model), train(learners, *rest)))
    tracerl.main([*SMALL, *flags])
    lines = metrics()
    assert all(line["gap_max"] < 1e-4 for line in lines) and any("kl" in line for line in lines)
    saved, _ = checkpoints.load_model("runs/tracerl/checkpoints/step-2")
    begun, _ = checkpoints.load_model("full" if "--model=full" in flags else TINY)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), trained[0].parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(saved.parameters(), begun.parameters()))
    assert explained({name for line in lines for name in line})


def test_a_run_by_the_definitions_alone_is_the_same_to_rounding(folder):
    for name, more in (("fast", []), ("plain", ["--plain"])):
        tracerl.main([*SMALL, *more, f"--name={name}", "--advantage=value", "--value_warmup=0", "--steps=1"])
    for fast, plain in zip(metrics("fast"), metrics("plain"), strict=True):
        for name in fast.keys() - {"rollout_seconds", "update_seconds"}:
            assert plain[name] == pytest.approx(fast[name], rel=1e-3, abs=1e-5), name
    (fast, _), (plain, _), (begun, _) = (checkpoints.load_model(path) for path in (
        "runs/fast/checkpoints/step-1", "runs/plain/checkpoints/step-1", TINY))
    distance = lambda one, other: sum((p - q).square().sum() for p, q in zip(one, other)) ** 0.5
    moved = distance(fast.parameters(), begun.parameters())
    assert moved > 0.02 and distance(fast.parameters(), plain.parameters()) < 1e-3 * moved


@pytest.mark.parametrize("more", [[], ["--lora_rank=4", "--advantage=value", "--value_warmup=0"]],
                         ids=["whole", "lora"])
def test_bfloat16_computes_and_float32_keeps(more, folder, monkeypatch):
    """Layers compute in bfloat16. The weights move by less than bfloat16 could say. Ratios stay near 1."""
    trained = []
    train = tracerl.train
    monkeypatch.setattr(tracerl, "train", lambda learners, *rest: (
        trained.append(learners.policy.model), train(learners, *rest)))
    tracerl.main([*SMALL, "--dtype=bfloat16", "--lr=1e-6", "--steps=1", *more])
    line, = metrics()
    assert 0 < line["gap"] < 0.1 and 1 <= line["ratio_max"] < 2 and line["skipped_updates"] == 0
    kept = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trained[0].named_parameters()}
    begun, _ = checkpoints.load_model(TINY)
    begun = dict(begun.named_parameters())
    saved, _ = checkpoints.load_model("runs/tracerl/checkpoints/step-1")
    if more:  # frozen weights are as they decode; adapters and what is saved with them merged in are float32
        assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in kept.values())
        assert {p.dtype for p in saved.parameters()} == {torch.float32}
        return
    assert {p.dtype for p in kept.values()} == {torch.float32}
    moves = torch.cat([(kept[name] - p).abs().flatten() for name, p in begun.items()])
    assert 0 < moves.max() < 2e-5 and (moves > 0).float().mean() > 0.5
    # What is saved is the policy as it decoded.
    assert all(torch.equal(p, kept[name].bfloat16()) for name, p in saved.named_parameters())


def test_the_trained_strategy_and_the_own_reward_are_evaluated_also_without_answers(folder, capsys):
    (folder / "mine.py").write_text("def short(text):\n    return -float(len(text))\n")
    Path("plain.jsonl").write_text('{"problem": "12+3="}\n' * 4)
    summary = tracerl.main([
        "--model", TINY, "--train_data=plain.jsonl", "--eval_data=plain.jsonl", "--dev_data=plain.jsonl",
        "--steps=1", "--prompts=2", "--group_size=2", "--eval_every=1", "--strategy=entropy",
        "--reward=mine.py:short"])
    assert summary["after"].keys() == summary["before"].keys() == {"dynamic", "static", "greedy", "entropy"}
    for found in (*summary["before"].values(), *summary["after"].values()):
        assert found["accuracy"] is None and found["reward"] < 0
    said = capsys.readouterr().out
    assert "no answers" in said and "mean of your reward, entropy" in said
    line, = metrics()
    assert line["dev_reward"] < 0 and "dev_accuracy" not in line and explained(line)


# ------------------------------------------------------------------------------------------------------------
# At the door.


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_explained_and_unknown_ones_refused(name, capsys):
    main = COMMANDS[name].main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert "(default: " in said and ("--temperature" in said or name == "sft")
    with pytest.raises(SystemExit, match="2"):
        main(["--stepz=3"])
    assert "unrecognized arguments: --stepz=3" in capsys.readouterr().err


def test_every_command_obeys_device(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, flags in dict(tracerl=SMALL, sft=["--model", TINY, "--data=train.jsonl"],
                            eval_math=["--model", TINY], rollout=["--model", TINY]).items():
        with pytest.raises(ValueError, match="--device cuda: torch sees no GPU on this machine"):
            COMMANDS[name].main([*flags, "--device=cuda"])


def test_help_has_groups_and_the_defaults_of_the_case_at_hand(capsys):
    with pytest.raises(SystemExit):
        tracerl.main(["--help"])
    said = capsys.readouterr().out
    places = [said.index(f"\n{title}:") for title in tracerl.GROUPS]
    assert places == sorted(places) and "These are the defaults for a tiny model." in said
    assert "(default: 45)" in said
    with pytest.raises(SystemExit):
        tracerl.main(["--model=x", "--help"])
    said = capsys.readouterr().out
    assert "(default: 80)" in said and "These are the defaults for this model." in said


# ------------------------------------------------------------------------------------------------------------
# In a terminal.


def test_a_decoding_plays_in_the_terminal(folder, capsys, monkeypatch):
    flags = ["--model", TINY, "--prompt=12+34=", "--max_new_tokens=12", "--seconds=0"]
    r, _, tokenizer = player.main(flags)
    prompt, *lines = capsys.readouterr().out.splitlines()
    assert prompt == "12+34=" and len(lines) == max(r.step_map) + 1
    for step, line in enumerate(lines):
        texts = [tokenizer.decode([token]) for token in r.response]
        shown = "".join(text if at <= step else player.MASK for text, at in zip(texts, r.step_map))
        assert line == f"step {step:3d}  {shown}"

    # rollout.py is a command, too.
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(sys, "argv", ["rollout.py", *flags])
    monkeypatch.delitem(sys.modules, "plumbing.player")  # as in a new process
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "rollout.py"), run_name="__main__")
    written.flush()
    assert written.buffer.getvalue().decode().splitlines() == [prompt, *lines]

    class Terminal(io.TextIOWrapper):
        """Somebody watches it."""
        isatty = lambda self: True

    terminal = Terminal(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    player.main(flags)
    terminal.flush()
    said = terminal.buffer.getvalue().decode()
    assert said.count("\033[2J") == max(r.step_map) + 1  # each step begins with an empty screen
    assert re.sub(r"\033\[[\d;]*[mH]", "", said).split("\033[2J")[-1].split() == [prompt, lines[-1][10:]]


def test_importing_does_nothing_and_the_last_words_under_torchrun_are_the_cause(folder):
    """A fresh python, in which any warning would be an error."""
    code = ("import sys; import model, rollout, eval_math, value, sft, tracerl, torch\n"
            "from plumbing import grading, runs\n"
            "print(torch.distributed.is_initialized(), grading.WORKERS.started, flush=True)\n"
            "sys.argv[0] = 'tracerl.py'\n"
            "runs.run_command(tracerl.main)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    done = subprocess.run(
        [*torchrun, sys.executable, "-W", "error", "-c", code, *SMALL, "--model=nowhere"],
        capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=120)
    assert done.stdout == "False 0\n" and done.returncode != 0, done.stderr
    *_, last, line = done.stderr.strip().splitlines()
    assert set(line) == {"="} and "tracerl.py: error: no checkpoint folder 'nowhere' (a hub id" in last
