"""Laws of a run: nothing is lost, nothing is wrong in silence."""

import html
import importlib.machinery
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, random_model, random_prompts, small_data
from safetensors.torch import load_file

import eval_math
import rollout
import sft
import tracerl
from plumbing import checkpoints, grading, parallel, player, runs, show

TINY = str(FIXTURES / "tiny")
SMALL = ["--model", TINY, "--train_data=train.jsonl", "--eval_data=test.jsonl", "--steps=1", "--prompts=4",
         "--group_size=4", "--max_new_tokens=20", "--lr=1e-3", "--eval_every=0", "--keep_range", "0", "1",
         "--tokens_per_micro_batch=2048", "--max_prompt_tokens=20"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with small data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)  # slow, and seen in test_commands.py
    small_data(tmp_path)
    return tmp_path


class file_size_limit:
    """Inside, no file of this process may grow beyond `limit` bytes: a disk that is full."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        self.kept = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.kept[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.kept)


# ------------------------------------------------------------------------------------------- what a user
# loses


def test_a_run_is_never_deleted_without_being_asked(folder):
    tracerl.main([*SMALL, "--name=mine"])
    saved = "runs/mine/checkpoints/step-1"
    start = [saved if flag == TINY else flag for flag in SMALL]
    with pytest.raises(ValueError, match="runs/mine holds a run: go on with it .--resume., replace it"):
        tracerl.main([*start, "--name=mine"])
    with pytest.raises(ValueError, match="lies inside runs/mine, which --overwrite would delete"):
        tracerl.main([*start, "--name=mine", "--overwrite"])
    assert os.path.isdir(saved)
    tracerl.main([*start, "--name=other"])
    os.rename("runs/mine/args.json", "args.json")
    with pytest.raises(ValueError, match="runs/mine holds a run without its args.json: put it back"):
        tracerl.main([*SMALL, "--name=mine", "--resume"])
    os.rename("args.json", "runs/mine/args.json")
    os.makedirs("runs/mine/checkpoints/step-7.partial/adapter")  # killed while it saved: this only may go
    tracerl.main([*SMALL, "--name=mine", "--resume"])
    assert os.listdir("runs/mine/checkpoints") == ["step-1"]
    tracerl.main([*SMALL, "--name=mine", "--overwrite"])


def test_four_processes_make_the_updates_of_one(folder):
    """A policy and a value model on four processes (the vocabulary of 18 does not divide by four); one process
    goes on from what they saved."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    def run(number, script, *flags):
        done = subprocess.run(
            [*torchrun, f"--nproc_per_node={number}", str(ROOT / script), *flags], text=True,
            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr

    start = [*SMALL, "--advantage=value", "--value_warmup=0", "--tokens_per_micro_batch=300"]
    run(4, "tracerl.py", *start, "--name=four")
    tracerl.main([*start, "--name=one"])
    for name in ("model.safetensors", "value/model.safetensors"):
        one, four = (load_file(f"runs/{run}/checkpoints/step-1/{name}") for run in ("one", "four"))
        apart = sum((one[key] - four[key]).square().sum() for key in one) ** 0.5
        if name == "model.safetensors":
            start_weights = load_file(f"{TINY}/{name}")
            moved = sum((one[key] - p).square().sum() for key, p in start_weights.items()) ** 0.5
        assert moved > 0.1 and apart < 1e-3 * moved
    tracerl.main(["--resume", "--steps=2", "--name=four"])
    assert len(Path("runs/four/metrics.jsonl").read_text().splitlines()) == 2


def test_the_log_is_whole_at_every_moment(folder, monkeypatch):
    with runs.Run("r", {}) as run:
        run.begin()
        for step in range(3):
            run.write(dict(step=step))
        lines = Path(run.path).read_text()
        monkeypatch.setattr(runs.os, "replace", lambda *paths: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run.keep_lines(run.own_lines()[:1])
        assert Path(run.path).read_text() == lines


def test_two_commands_never_work_in_one_folder(folder):
    with runs.Run("r", {}):
        with pytest.raises(ValueError, match=f"runs/r is in use by process {os.getpid()} on"):
            runs.Run("r", {}, overwrite=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, time; file = open('runs/r/lock', 'a')\n"
         "fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match="in use"):
        runs.Run("r", {}, overwrite=True)
    holder.kill()  # the kernel lets go of the lock of whoever dies
    holder.wait()
    with runs.Run("r", {}, overwrite=True):
        pass


def test_a_command_that_cannot_start_replaces_nothing(folder):
    with runs.Run("tracerl", {}) as run:
        run.begin()
        run.write(dict(step=1))
    for model in ("nowhere", TINY):  # no such model; no such data
        with pytest.raises(FileNotFoundError):
            tracerl.main(["--model", model, "--train_data=x.jsonl", "--eval_data=x.jsonl", "--overwrite"])
        assert Path("runs/tracerl/metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_graded_file_never_overwrites_its_input(folder):
    Path("answers.jsonl").write_text('{"gold": "1", "response": "\\\\boxed{1}"}\n')
    before = Path("answers.jsonl").read_text()
    with pytest.raises(ValueError, match="would be overwritten"):
        eval_math.main(["--grade=answers.jsonl", "--out=./answers.jsonl"])
    assert Path("answers.jsonl").read_text() == before


def test_a_full_disk_is_a_clear_error_wherever_it_strikes(folder, monkeypatch):
    with runs.Run("r", {}) as run:
        run.begin()
        with file_size_limit(10), pytest.raises(RuntimeError, match="metrics.jsonl could not .*free some"):
            run.write(dict(step=1, text="longer than that"))
        with file_size_limit(10), pytest.raises(RuntimeError, match="summary.json could not be written"):
            run.finish(dict(text="longer than that"))
        model = random_model()
        with file_size_limit(20_000), pytest.raises(RuntimeError, match="runs/r/checkpoint could not be"):
            run.save_model(model, sft.tiny_tokenizer())
    with file_size_limit(100), pytest.raises(RuntimeError, match="args.json could not be written"):
        runs.Run("s", dict(text="longer than that" * 10)).begin()
    left = [str(path) for path in Path("runs").rglob("*.partial*")]
    assert not left and not os.path.exists("runs/r/checkpoint")


def flip(path, place=-100):
    """Changes one byte of a file."""
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 1
    Path(path).write_bytes(content)


def test_damaged_files_are_named_with_the_remedy(folder):
    tracerl.main([*SMALL, "--name=r"])
    resume = ["--name=r", "--resume", "--steps=2"]
    state = "runs/r/checkpoints/step-1/train_state"
    shutil.copytree("runs/r", "kept")

    def damaged(message, path, content=None):
        if content is None:
            flip(path)
        else:
            Path(path).write_text(content)
        with pytest.raises(ValueError, match=message):
            tracerl.main(resume)
        shutil.rmtree("runs/r")
        shutil.copytree("kept", "runs/r")

    damaged("__0_0.distcp is not what was saved. Move it away", f"{state}/__0_0.distcp")
    damaged("progress.json is damaged", f"{state}/progress.json", '{"step": 1')
    damaged("args.json is damaged", "runs/r/args.json", "{")
    damaged("metrics.jsonl, line 1 is damaged", "runs/r/metrics.jsonl", "{{}\n")
    os.remove(f"{state}/__0_0.distcp")
    with pytest.raises(ValueError, match="is not what was saved"):
        tracerl.main(resume)
    shutil.copytree(TINY, "tiny")
    Path("tiny/config.json").write_text("{")
    with pytest.raises(ValueError, match="tiny/config.json is damaged"):
        checkpoints.load_model("tiny")
    shutil.copy(f"{TINY}/config.json", "tiny/config.json")
    Path("tiny/model.safetensors").write_bytes(Path(f"{TINY}/model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="tiny/model.safetensors is damaged"):
        checkpoints.load_model("tiny")


# ------------------------------------------------------------------------------------------ wrong in silence


def test_an_evaluation_knows_its_weights_and_data(folder):
    shutil.copytree(TINY, "model")
    flags = ["--model=model", "--data=test.jsonl", "--max_new_tokens=20", "--strategy=static"]
    eval_math.main(flags)
    assert os.path.isfile("runs/eval-model-test.jsonl/responses.jsonl")
    eval_math.main(flags)  # nothing has changed: it goes on
    model, tokenizer = checkpoints.load_model("model")
    model.head.weight.data[3] += 0.1
    checkpoints.save_checkpoint(model, tokenizer, "model")
    with pytest.raises(ValueError, match="other settings: weights was '[0-9a-f]+', is"):
        eval_math.main(flags)
    small_data(folder, seed=1)
    with pytest.raises(ValueError, match="problems was"):
        eval_math.main(flags)


def test_a_collapse_is_seen_and_said(folder, capsys):
    """One update per step: ratio, KL and clip of the update say nothing; drift does."""
    tracerl.main([*SMALL, "--lr=0.1", "--minibatches=1", "--warmup=0"])
    line, = [json.loads(line) for line in open("runs/tracerl/metrics.jsonl")]
    assert line["ratio_max"] == 1 and line["kl"] == 0 and line["drift_kl"] > show.MAX_DRIFT
    assert "WARNING: step 1 moved the policy by" in capsys.readouterr().out


def test_steps_without_an_update_are_counted_and_said(capsys):
    progress = {}
    for step in range(1, 11):
        show.warn(dict(step=step, reward=1.0), progress)
    assert capsys.readouterr().out.count("WARNING: no update in") == 2
    show.warn(dict(step=11, reward=1.0, kl=0.0, drift_kl=0.001), progress)
    assert progress["idle_steps"] == 0


def test_a_library_call_ends_at_the_models_own_eos():
    model = random_model()
    rollouts = rollout.generate(model, random_prompts([5] * 20), max_new_tokens=40)
    assert any(not r.is_truncated for r in rollouts)


def test_unknown_characters_are_an_error():
    with pytest.raises(ValueError, match="does not know all characters of 'what is 12.3"):
        eval_math.encode_prompts([eval_math.Problem("what is 12+3=", "15")], sft.tiny_tokenizer(), 99)


def test_an_answer_alone_is_no_solution_to_learn_from(folder):
    Path("answers.jsonl").write_text('{"problem": "12+3=", "answer": "15"}\n')
    problems = eval_math.load_problems("answers.jsonl")
    assert problems[0].solution == ""
    with pytest.raises(ValueError, match="no solution to learn from: '12.3='"):
        sft.to_examples(problems, sft.tiny_tokenizer(), random_model().config, 20)


def test_the_trained_strategy_and_the_own_reward_are_evaluated(folder, capsys):
    Path("mine.py").write_text("def short(problem, text, tokens):\n    return -float(len(tokens))\n")
    summary = tracerl.main([*SMALL, "--strategy=entropy", "--reward=mine.py:short"])
    assert set(summary["after"]) == {"dynamic", "static", "greedy", "entropy"}
    assert all(found["reward"] < 0 for found in summary["before"].values())
    assert "mean of your reward, entropy" in capsys.readouterr().out


def test_data_without_answers_have_a_reward_and_no_accuracy(folder, capsys):
    Path("mine.py").write_text("def short(problem, text, tokens):\n    return -float(len(tokens))\n")
    Path("plain.jsonl").write_text('{"problem": "12+3="}\n' * 4)
    summary = tracerl.main([*SMALL, "--reward=mine.py:short", "--eval_data=plain.jsonl", "--eval_every=1",
                            "--dev_data=plain.jsonl", "--keep_range", "-99", "0"])
    assert {found["accuracy"] for found in summary["after"].values()} == {None}
    assert summary["after"]["dynamic"]["reward"] < 0 and "no answers" in capsys.readouterr().out
    line = json.loads(Path("runs/tracerl/metrics.jsonl").read_text())
    assert line["dev_reward"] < 0 and "dev_accuracy" not in line


# --------------------------------------------------------------------------------------- ways that are open


def test_resume_takes_its_settings_from_the_run(folder, monkeypatch):
    """Steps may differ; nothing else has to be said again, and no warm start is made. (But with adapters:
    checkpoints hold merged weights, and the restored adapters, added to those, would count twice.)"""
    monkeypatch.setattr(sft, "warm_start", lambda *_: TINY)
    data = ["--train_data=train.jsonl", "--eval_data=test.jsonl", "--prompts=4", "--group_size=4",
            "--eval_every=0"]
    tracerl.main(["--steps=1", *data, "--keep_range", "0", "1"])
    monkeypatch.setattr(sft, "warm_start", lambda *_: pytest.fail("a warm start"))
    tracerl.main(["--resume", "--steps=2"])
    args = json.loads(Path("runs/tracerl/args.json").read_text())
    assert args["prompts"] == 4 and args["steps"] == 2 and args["keep_range"] == [0, 1]
    assert len(Path("runs/tracerl/metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="other settings: lr was 0.0001, is 0.5. Say what the run says"):
        tracerl.main(["--resume", "--steps=2", "--lr=0.5"])
    monkeypatch.setattr(sft, "warm_start", lambda *_: TINY)
    data += ["--keep_range", "0", "1", "--lora_rank=2", "--lr=1e-2", "--warmup=0"]
    tracerl.main([*data, "--steps=2", "--name=whole"])
    tracerl.main([*data, "--steps=1", "--name=parts"])
    tracerl.main(["--name=parts", "--resume", "--steps=2"])
    whole, parts = (load_file(f"runs/{name}/checkpoints/step-2/model.safetensors")
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_killed_checks_leave_no_open_files():
    workers = grading.Workers()
    workers.run("x+1", "1+x")
    opened = None
    for _ in range(4):
        process = workers.idle.get() or workers.start()
        process.kill()
        workers.idle.put(process)
        process.wait()
        for _ in range(workers.NUMBER):
            workers.run("\\sqrt{3}", "\\sqrt{3}")
        now = len(os.listdir("/proc/self/fd"))
        opened = opened or now
    assert now <= opened + 4 and workers.killed == 4


def test_one_long_prompt_does_not_make_all_others_long(monkeypatch):
    model, tokens = random_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, *rest: (tokens.append(t.shape), hidden(t, *rest))[1])
    prompts = random_prompts([3000] + [10] * 64)
    rollout.generate(model, prompts, max_new_tokens=1)
    prefills = [shape for shape in tokens if shape[1] > 4]
    assert prefills == [(64, 8), (1, 3000)]


def test_ctrl_c_is_one_line_and_warnings_of_libraries_are_none(folder):
    """Under -W error, so that any warning would end it; stopped in its second step, with a curve drawn."""
    command = [sys.executable, "-W", "error", str(ROOT / "tracerl.py"), *SMALL, "--steps=100000",
               "--save_every=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "step   2" not in (line := process.stdout.readline()):
        assert line or process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].endswith(
        "stopped. To go on: the same command with --resume (eval_math.py: without)")
    assert "Traceback" not in errors and os.path.isfile("runs/tracerl/curves.png")


def test_a_mistake_is_one_line_with_status_2(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/tracerl.py", "--model", "nowhere", *SMALL[2:]])
    with pytest.raises(SystemExit, match="2"):
        runs.run_command(tracerl.main)
    assert capsys.readouterr().err == (
        "tracerl.py: error: no checkpoint folder 'nowhere' (a hub id looks like JetLM/SDAR-4B-Chat) "
        "(--debug shows where)\n")
    monkeypatch.setattr(tracerl, "load_start", lambda args: 1 / 0)  # a mistake of ours shows where
    with pytest.raises(SystemExit, match="1"):
        runs.run_command(tracerl.main)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_error_of_a_library_comes_with_its_traceback(monkeypatch, capsys):
    """Also where the library lies in a virtual environment inside the project."""
    monkeypatch.setattr(sys, "argv", ["tracerl.py"])
    code = compile("raise RuntimeError('CUDA out of memory')", str(ROOT / ".venv/lib/torch/x.py"), "exec")
    with pytest.raises(SystemExit, match="1"):
        runs.run_command(lambda: exec(code))
    assert "Traceback" in capsys.readouterr().err


def test_a_run_stopped_before_it_began_lets_go_of_its_name(folder):
    with pytest.raises(KeyboardInterrupt):
        with runs.Run("r", {}):
            raise KeyboardInterrupt
    with runs.Run("r", {}) as run:
        run.begin()


def test_the_last_words_under_torchrun_are_the_cause(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "tracerl.py"), "--model", "nowhere", *SMALL[2:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    *_, last, line = done.stderr.strip().splitlines()
    assert done.returncode != 0 and set(line) == {"="}
    assert "tracerl.py: error: no checkpoint folder 'nowhere' (a hub id" in last


def test_help_has_groups_and_the_most_used_flags_come_first(capsys):
    with pytest.raises(SystemExit):
        tracerl.main(["--help"])
    said = capsys.readouterr().out
    groups = [said.index(title) for title in ("most used:", "method:", "policy:", "decoding:", "machine:")]
    assert groups == sorted(groups) and "suit billions of parameters" in said and "default: 45" in said
    with pytest.raises(SystemExit):
        tracerl.main(["--model=x", "--help"])
    assert "default: None" in capsys.readouterr().out  # the defaults of the case at hand


def test_a_mistake_before_the_first_line_leaves_the_name_free(folder):
    with pytest.raises(FileNotFoundError):
        tracerl.main([*SMALL, "--eval_data=missing.jsonl"])
    tracerl.main(SMALL)


def test_fine_tuning_goes_on_to_more_steps(folder, monkeypatch):
    rows = [json.dumps({"prompt": p.problem, "response": p.solution})
            for p in eval_math.arithmetic("train", 30)]
    Path("worked.jsonl").write_text("\n".join(rows))
    flags = ["--model", TINY, "--data=worked.jsonl", "--steps=4", "--cooldown=2", "--lr=1e-3", "--warmup=1",
             "--batch_size=10", "--max_new_tokens=20", "--save_every=0"]
    sft.main(flags)
    sft.main(["--resume", "--steps=6"])
    lines = [json.loads(line) for line in open("runs/sft/metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[3]["lr"] < lines[4]["lr"] or lines[4]["lr"] > lines[5]["lr"]


def test_processes_end_when_torchrun_dies(folder):
    """Killed without a chance to say goodbye; its processes must not go on alone."""
    script = "import os, sys, time; sys.path.insert(0, sys.argv[1]); from plumbing import parallel\n" \
             "parallel.start_processes(); open(f'pid{os.getpid()}', 'w').close(); time.sleep(60)\n"
    Path("wait.py").write_text(script)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "wait.py",
         str(ROOT)],
        stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while len(list(Path(".").glob("pid*"))) < 2 and time.time() < deadline:
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    pids = [path.name.removeprefix("pid") for path in Path(".").glob("pid*")]
    assert len(pids) == 2
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_processes_that_see_other_folders_are_told_before_training(folder, monkeypatch):
    """Two nodes without a shared disk: the second does not find the first one's lock."""
    with runs.Run("r", {}):
        pass
    monkeypatch.setattr(parallel, "from_first", lambda value: "process 7 on another machine")
    with pytest.raises(ValueError, match="not all processes see the same runs/s"):
        runs.Run("s", {})


def test_metrics_go_to_other_programs_when_asked(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--report_to wandb: it is not installed"):
        runs.Run("r", dict(report_to="wandb"))
    logged, wandb = [], types.ModuleType("wandb")
    wandb.init = lambda **settings: types.SimpleNamespace(
        log=lambda line, step: logged.append((step, line)), finish=lambda: logged.append("finished"))
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with runs.Run("s", dict(report_to="wandb")) as run:
        run.begin()
        run.write(dict(step=1, reward=0.5))
    assert logged == [(1, dict(step=1, reward=0.5)), "finished"]


def test_the_page_plays(folder):
    """Slider, button and colours, in node with a stand-in for the page's elements."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    model, tokenizer = random_model(), sft.tiny_tokenizer()
    rollouts = rollout.generate(model, random_prompts([3, 3, 9, 9]), max_new_tokens=12, seed=1, eos_ids=())
    for i, r in enumerate(rollouts):
        r.prompt = rollouts[i // 2 * 2].prompt  # two responses each
        r.reward, r.advantage, r.ratio = float(i % 2), [0.5] * 12, [1.01] * 12
    pairs = show.best_and_worst(rollouts)
    assert [[r.reward for r in pair] for pair in pairs] == [[1.0, 0.0], [1.0, 0.0]]
    show.write_page(pairs, 4, tokenizer, "trace.html")
    done = subprocess.run(["node", str(ROOT / "tests/page.js"), "trace.html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tokens, last = sum(len(r.response) for r in rollouts), max(max(r.step_map) for r in rollouts)
    assert found["tokens"] == tokens and found["hidden_at_start"] == 0
    blocks = [{(len(r.prompt) + j) // 4 for j in range(len(r.response))} for r in rollouts]
    assert found["blocks"] == sum(map(len, blocks))
    assert found["hidden_at_1"] == tokens - sum(r.step_map.count(1) for r in rollouts)
    assert found["playing"] == "Pause" and found["played"] == "Play" and found["hidden_at_end"] == 0
    assert found["output"] == f"after step {last} of {last}"
    assert found["by_advantage"].startswith("hsl(90 ") and found["by_ratio"].startswith("hsl(6")


BROWSER_TEST = """<script>
slider.value = 1; slider.dispatchEvent(new Event("input"));
const hidden = () => [...document.querySelectorAll(".token")].filter(t => t.textContent === "\u2591").length;
const seen = { hidden: hidden(), tokens: document.querySelectorAll(".token").length };
document.querySelector(".token").click();
seen.numbers = document.querySelector("small").textContent;
button.click();
setTimeout(() => {
  document.title = JSON.stringify({ ...seen, left: hidden(), button: button.textContent, errors });
}, 350 * (last + 3));
</script>"""


def test_the_page_plays_in_a_browser(folder):
    """The same in a real one, without a window: no errors on the console, slider and button work."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    rollouts = rollout.generate(random_model(), random_prompts([3, 3]), max_new_tokens=12, seed=1, eos_ids=())
    show.write_page([rollouts], 4, sft.tiny_tokenizer(), "trace.html")
    catch = ("<script>const errors = []; onerror = m => errors.push(m); "
             "console.error = m => errors.push(m);</script>")
    page = Path("trace.html").read_text().replace("<title>", catch + "<title>")
    Path("trace.html").write_text(page.replace("</html>", BROWSER_TEST + "</html>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--virtual-time-budget=30000", "--dump-dom",
         (folder / "trace.html").as_uri()], capture_output=True, text=True, timeout=60)
    seen = json.loads(html.unescape(re.search("<title>(.*)</title>", done.stdout)[1]))
    tokens = sum(len(r.response) for r in rollouts)
    assert seen["numbers"].startswith("text ") and "logp" in seen["numbers"]  # of the token that was touched
    assert seen["errors"] == [] and seen["tokens"] == tokens and seen["button"] == "Play"
    assert seen["hidden"] == tokens - sum(r.step_map.count(1) for r in rollouts) and seen["left"] == 0


def test_a_decoding_plays_in_the_terminal(folder, capsys):
    player.main(rollout, ["--model", TINY, "--prompt=12+34=", "--max_new_tokens=12"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12+34=" and lines[1].startswith("step   0  " + "\u2591" * 12)
    assert "\u2591" not in lines[-1]
