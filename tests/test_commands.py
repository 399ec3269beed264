"""The commands of the README, run as a person would run them."""

import contextlib
import io
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, random_model, small_data
from safetensors.torch import load_file

import bench_methods
import bench_update
import eval_math
import rollout
import sft
import tracerl
from plumbing import checkpoints, parallel, player, runs, tiny

TINY, FORKS = str(FIXTURES / "tiny"), str(ROOT / "tests/forks.py")
DATA = ["--train_data=arithmetic", "--dev_data=arithmetic-dev", "--eval_data=arithmetic-test"]
SMALL = ["--steps=2", "--prompts=6", "--group_size=4", "--max_new_tokens=20", "--lr=1e-3",
         "--minibatches=2", "--eval_every=0", "--warmup=0", "--keep_range", "0", "1",
         "--tokens_per_micro_batch=2048", "--slots=16", "--max_prompt_tokens=20"]


def run(*command, cwd, processes=1, code=0):
    """Runs a script of the project with torchrun -> its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run",
                "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launcher, str(ROOT / command[0]), *command[1:]], cwd=cwd, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The same two RL steps on one process and on two."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [json.dumps(dict(problem=p.problem, answer=p.answer)) for p in eval_math.arithmetic("test", 100)]
    (folder / "hundred.jsonl").write_text("\n".join(rows))
    few = small_data(folder)  # of test problems: what is evaluated changes nothing else
    output, home = io.StringIO(), os.getcwd()
    os.chdir(folder)
    with contextlib.redirect_stdout(output):
        tracerl.main(["--model", TINY, few[0], DATA[1], "--eval_data=hundred.jsonl", *SMALL, "--name=one"])
    os.chdir(home)
    run("tracerl.py", "--model", TINY, *few, *SMALL, "--name=two", cwd=folder, processes=2)
    return folder / "runs", output.getvalue()


def shorten(monkeypatch):
    """The embedded data with 200 problems at most: making and encoding all 20,000 takes seconds."""
    whole = eval_math.arithmetic
    monkeypatch.setattr(eval_math, "arithmetic", lambda split, number, *more: whole(
        split, min(number, 200), *more))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_make_the_same_update_as_one(two_runs):
    folder, _ = two_runs
    for one, two in zip(lines(folder / "one"), lines(folder / "two"), strict=True):
        assert one["kept_groups"] > 0 and one["skipped_updates"] == 0
        for name, value in one.items():
            if "seconds" not in name:
                assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    one, two = (checkpoints.load_model(folder / name / "checkpoints/step-2")[0] for name in ("one", "two"))
    start, _ = checkpoints.load_model(TINY)
    moved = sum((p - q).norm() ** 2 for p, q in zip(one.parameters(), start.parameters())) ** 0.5
    apart = sum((p - q).norm() ** 2 for p, q in zip(one.parameters(), two.parameters())) ** 0.5
    assert moved > 0.1 and apart < 1e-3 * moved


def test_three_processes_with_little_to_do_make_the_same_updates_as_one(tmp_path, monkeypatch):
    """Value model, adapters, mini-batches of two rollouts: at times some processes have no row at all."""
    flags = ["--model", TINY, *small_data(tmp_path), *SMALL,
             "--advantage=value", "--value_warmup=1", "--prompts=3", "--group_size=2",
             "--minibatches=3", "--lora_rank=2", "--steps=2"]
    run("tracerl.py", *flags, "--name=three", cwd=tmp_path, processes=3)
    monkeypatch.chdir(tmp_path)
    tracerl.main([*flags, "--name=one"])
    compare = lambda old, new: [new[name] == pytest.approx(value, rel=1e-3, abs=1e-5)
                                for name, value in old.items() if "seconds" not in name]
    for one, three in zip(lines(tmp_path / "runs/one"), lines(tmp_path / "runs/three"), strict=True):
        assert all(compare(one, three)), (one, three)
    for name in ("model.safetensors", "value/model.safetensors"):
        one, three = (load_file(tmp_path / f"runs/{run}/checkpoints/step-2/{name}")
                      for run in ("one", "three"))
        assert all(torch.allclose(one[key], three[key], atol=2e-4) for key in one)


def test_a_run_leaves_behind_what_the_readme_says(two_runs):
    folder, output = two_runs
    assert {p.name for p in (folder / "one").iterdir()} - {"lock"} == {
        "args.json", "checkpoints", "curves.png", "metrics.jsonl", "summary.json", "trace.html"}
    summary = json.loads((folder / "one/summary.json").read_text())
    assert set(summary) == {"before", "after", "seconds", "replay_gap_max", "seed"}
    for part in (summary["before"], summary["after"]):
        assert set(part) == {"dynamic", "static", "greedy"}
        assert all(e["n"] == 100 and {"accuracy", "standard_error"} <= set(e) for e in part.values())
    assert 0.4 < summary["before"]["dynamic"]["accuracy"] < 0.65 and summary["replay_gap_max"] < 1e-4
    assert summary["before"]["static"]["tokens_per_step"] == pytest.approx(1)
    assert "before" in output and "+-" in output and "step   2  reward" in output
    readme = (ROOT / "README.md").read_text()
    for name in lines(folder / "one")[0]:
        assert f"`{name}`" in readme, f"the README does not explain {name}"


def test_a_mistake_ends_with_a_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        tracerl.main(["--model=nowhere/at/all", *DATA])
    with pytest.raises(FileNotFoundError, match="no data file 'missing.jsonl'"):
        tracerl.main(["--model", TINY, *DATA[:2], "--eval_data=missing.jsonl"])
    with pytest.raises(ValueError, match="--rollout_block_size 8 must divide the block size, 4"):
        tracerl.main(["--model", TINY, *DATA, "--rollout_block_size=8"])
    with pytest.raises(SystemExit):
        tracerl.main(["--stepz=3"])
    assert "unrecognized arguments: --stepz=3" in capsys.readouterr().err


def test_the_readme_gives_the_install_and_main_commands():
    readme = (ROOT / "README.md").read_text()
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert install + "torchrun tracerl.py\n" in readme and install + "pytest\n" in readme


def commands():
    """Every command of the README and of the six files' docstrings: (script, flags, whether it is only
    parsed, since it needs a GPU or a model from the hub)."""
    found = []
    for name in ("README.md", "model.py", "rollout.py", "value.py", "sft.py", "eval_math.py", "tracerl.py"):
        for line in (ROOT / name).read_text().splitlines():
            command = line.partition("  #")[0]
            match = re.match(r" +(?:torchrun|python) (?:--\S+ )*((?:tests/)?\w+\.py)(.*)", command)
            if match:
                flags = shlex.split(match[2])
                model = flags[flags.index("--model") + 1] if "--model" in flags else ""
                is_remote = "# GPU" in line or (model and not model.startswith("runs/"))
                found.append((match[1], flags, bool(is_remote)))
    return found


def test_every_command_of_the_readme_and_the_docstrings_is_understood_and_runs(tmp_path, monkeypatch, capsys):
    """In a small way: one step, few prompts, an untrained model in place of the warm starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    for name in eval_math.EMBEDDED:
        whole = eval_math.EMBEDDED[name]
        few = lambda split, number, *more, whole=whole: whole(split, min(number, 30), *more)
        monkeypatch.setitem(eval_math.EMBEDDED, name, few)

    def start(seed, block_size=4, attention="block", task="arithmetic", path=None):
        path = path or f"runs/start-{block_size}-{attention}/checkpoint"
        checkpoints.save_checkpoint(
            tiny.tiny_model(seed, block_size, attention), tiny.tiny_tokenizer(), path)
        return path

    monkeypatch.setattr(sft, "warm_start", start)
    start(0, path="runs/tracerl/checkpoints/step-45")
    (tmp_path / "answers.jsonl").write_text('{"gold": "5", "response": "\\\\boxed{5}"}\n')
    ran = set()
    for script, flags, is_remote in commands():
        module = dict(tracerl=tracerl, sft=sft, eval_math=eval_math).get(script.removesuffix(".py"))
        if is_remote:
            if module:
                module.parse_args([flag.replace("--device", "--name") for flag in flags])
            continue
        ran.add(script)
        if script == "tracerl.py":
            small = ["--prompts=2", "--group_size=2", "--eval_every=0", "--adapt_steps=0"]
            if "--resume" in flags:
                small = ["--steps=2"]
            elif "--name" not in flags:
                small += ["--overwrite", "--steps=1"]
            else:
                small += ["--steps=1"]
            tracerl.main(flags + small)
        elif script == "sft.py":
            sft.main([*flags, "--steps=1", "--batch_size=8", "--overwrite"])
        elif script == "eval_math.py":
            eval_math.main([*flags, "--limit=2"] if "--grade" not in flags else flags)
        elif script == "rollout.py":
            player.main(rollout, flags)
        else:
            raise AssertionError(f"nobody runs {script}")
    assert ran == {"tracerl.py", "sft.py", "eval_math.py", "rollout.py"}


def test_importing_the_files_does_nothing():
    code = ("import model, rollout, eval_math, value, sft, tracerl, torch; from plumbing import grading; "
            "print(torch.distributed.is_initialized(), grading.WORKERS.started)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False 0\n", done.stderr


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Killed with step 4's checkpoint half written, resumed: weights and metrics of a run left in peace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    flags = ["--model", TINY, *small_data(tmp_path), *SMALL, "--advantage=value", "--value_warmup=1",
             "--value_epochs=1", "--steps=5", "--save_every=1", "--keep_checkpoints=2"]
    tracerl.main([*flags, "--name=whole"])
    script = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import tracerl\n"
              "from plumbing import runs\n"
              "write = runs.write_json\n"
              "def stop(path, value):\n"
              "    os.kill(os.getpid(), 9) if 'step-4.partial' in str(path) else write(path, value)\n"
              "runs.write_json = stop\ntracerl.main(sys.argv[1:])\n")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: other threads, other rounding
    done = subprocess.run([sys.executable, "-c", script, *flags, "--name=killed"],
                          capture_output=True, text=True, env=one_thread)
    assert done.returncode == -9, done.stderr
    assert {p.name for p in (tmp_path / "runs/killed/checkpoints").iterdir()} == {
        "step-2", "step-3", "step-4.partial"}
    tracerl.main([*flags, "--name=killed", "--resume"])
    for name in ("model.safetensors", "value/model.safetensors"):
        whole, resumed = (load_file(tmp_path / f"runs/{run}/checkpoints/step-5/{name}")
                          for run in ("whole", "killed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    quiet = lambda line: {name: value for name, value in line.items() if "seconds" not in name}
    assert ([quiet(line) for line in lines(tmp_path / "runs/whole")]
            == [quiet(line) for line in lines(tmp_path / "runs/killed")])
    assert {p.name for p in (tmp_path / "runs/killed/checkpoints").iterdir()} >= {"step-4", "step-5"}
    with pytest.raises(ValueError, match="other settings: lr was 0.001, is 1.0\\. Say"):
        tracerl.main([*flags, "--name=killed", "--resume", "--lr=1"])


@pytest.mark.parametrize("more", [[], ["--lora_rank=4", "--advantage=value", "--value_warmup=0"]],
                         ids=["full", "lora"])
def test_bfloat16_computes_and_float32_keeps(more, tmp_path, monkeypatch):
    """Layers compute in bfloat16, the weights move by less than bfloat16 could say, ratios stay near 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    tracerl.main(["--model", TINY, *small_data(tmp_path), *SMALL,
                  "--dtype=bfloat16", "--lr=1e-6", *(more or ["--save_dtype=float32"])])
    assert all(0 < line["gap"] < 0.1 and 1 <= line["ratio_max"] < 2 and line["skipped_updates"] == 0
               for line in lines(tmp_path / "runs/tracerl"))
    start, saved = (load_file(f"{TINY}/model.safetensors"),
                    load_file(tmp_path / "runs/tracerl/checkpoints/step-2/model.safetensors"))
    assert all(p.dtype == torch.float32 for p in saved.values())
    if not more:
        moves = torch.cat([(saved[name] - p).abs().flatten() for name, p in start.items()])
        assert 0 < moves.max() < 2e-5 and (moves > 0).float().mean() > 0.5


def test_a_full_disk_a_foreign_checkpoint_and_a_taken_name_are_clear_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    flags = ["--model", TINY, *small_data(tmp_path), *SMALL, "--save_every=1"]
    keep = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = runs.Run.save

    def save_on_a_full_disk(self, tokenizer, trainers, progress, *rest):
        if progress["step"] == 2:  # no file may grow beyond 200 kB: the weights do not fit
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, keep[1]))
        save(self, tokenizer, trainers, progress, *rest)

    monkeypatch.setattr(runs.Run, "save", save_on_a_full_disk)
    try:
        with pytest.raises(RuntimeError, match="step-2 could not be written .*--resume"):
            tracerl.main([*flags, "--name=full"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, keep)
    monkeypatch.setattr(runs.Run, "save", save)
    checkpoints.load_model(tmp_path / "runs/full/checkpoints/step-1")
    tracerl.main([*flags, "--name=full", "--resume"])
    assert [line["step"] for line in lines(tmp_path / "runs/full")] == [1, 2]
    # another model's train state in the place of ours
    model = random_model()
    with runs.Run("other", {}) as other:
        other.begin()
        other.save(None, [(model, parallel.make_optimizer(model, 0.1, (0.9, 0.95)))], dict(step=2), keep=1)
    shutil.rmtree("runs/full/checkpoints/step-2")
    shutil.copytree("runs/other/checkpoints/step-2", "runs/full/checkpoints/step-2")
    with pytest.raises(ValueError, match="step-2 cannot be resumed from"):
        tracerl.main([*flags, "--name=full", "--resume"])
    (tmp_path / "runs/taken").write_text("a file")
    with pytest.raises(ValueError, match="cannot write to runs/taken"):
        tracerl.main([*flags, "--name=taken"])


def test_the_comparison_of_methods_runs_and_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    flags = ["--model", TINY, *small_data(tmp_path), "--dev_data=test.jsonl", "--prompts=4", "--group_size=4",
             "--keep_range", "0", "1", "--max_new_tokens=20", "--tokens_per_micro_batch=2048",
             "--value_warmup=0"]
    more = [f"--more={flag}" for flag in flags] + ["--steps=1", "--seeds=2"]
    arms = ["--arms", "tracerl", "coupled"]
    found = bench_methods.main(["--settings", "k4", *arms, "--lrs", "1e-3", "1e-4", *more])
    assert set(found["k4"]) == {"tracerl", "coupled"}
    for lr, results in found["k4"].values():
        assert lr in ("1e-3", "1e-4") and len(results) == 2 and all(0 <= r["dynamic"] <= 1 for r in results)
    assert json.loads((tmp_path / "runs/methods.json").read_text()).keys() == {"k4"}
    output = capsys.readouterr().out
    assert "python tracerl.py --views=coupled --lr=1e-3" in output and "| coupled | 1e-" in output
    # all done
    assert bench_methods.main(["--settings", "k4", *arms, "--lrs", "1e-3", "1e-4", *more]) == found
    bench_methods.main(["--show", "--out", str(ROOT / "tests/evidence.json"), "--picture=q.png"])
    assert "sudoku-full, 5 seeds" in capsys.readouterr().out and (tmp_path / "q.png").is_file()
    noise = bench_methods.main(
        ["--settings", "k4", "--variance", "--resamples=3", "--value_steps=1", *more])["k4"]
    assert set(noise) == {"group", "batch", "raw", "value", "random", "as-many-random", "coupled"}
    assert noise["raw"][2] == pytest.approx(1, abs=1e-4)
    assert all(abs(cosine) < 1.0001 for *_, cosine in noise.values())


@pytest.mark.parametrize("layout", ["authors", "unpadded", "replayed", "packed"])
def test_the_cost_of_an_update_can_be_measured_in_every_layout(layout, capsys):
    bench_update.main(["--measures=update", "--preset=tiny", f"--layout={layout}", "--responses=2",
                       "--repeats=1",
                       "--threads=1", "--range", "8", "16", "--padded=16", "--prompt=8"])
    assert json.loads(capsys.readouterr().out)["trained"] == 24


def test_the_noise_of_a_gradient_is_its_variance_over_its_squared_mean():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((1000,), 0.1)
    ratio, error = bench_methods.noise(list(mean + torch.randn(64, 1000, generator=generator)))
    assert ratio == pytest.approx(1000 / 10, rel=0.15) and 0 < error < 15


@pytest.mark.parametrize("flags", [
    ["--advantage=value", "--value_warmup=1", "--value_lr=1e-3"],
    ["--advantage=batch", "--views=coupled"],
    ["--advantage=raw", "--views=random"],
    ["--shrink=2", "--strategy=static"],
    ["--block_size=8", "--rollout_block_size=4", "--adapt_steps=1"],
    ["--reward=mine.py:short", "--keep_range", "-99", "0"],
    ["--advantage=value", "--value_warmup=0", "--reward=mine.py:each", "--gamma=0.9", "--gae_lambda=0.5"],
    [f"--loss={FORKS}:clip_higher", f"--views={FORKS}:some_steps"],
    [f"--loss={FORKS}:sequence_ratio"],
    [f"--advantage={FORKS}:centered", f"--loss={FORKS}:constant_length"],
    [f"--advantage={FORKS}:mean_per_step", f"--views={FORKS}:as_many_random"],
    [f"--advantage={FORKS}:softmax_weights", f"--loss={FORKS}:ratio_free"],
    [f"--views={FORKS}:fully_masked", "--strategy=sequential", "--block_size=8"],
], ids=lambda flags: " ".join(flags).replace(FORKS, "forks.py"))
def test_every_variant_runs_and_its_checkpoint_is_the_policy(flags, tmp_path, monkeypatch):
    """Two RL steps by `main`: the gap holds before the update, the policy moves, and what was saved loads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def short(problem, text, tokens):\n    return -float(len(set(tokens)))\n\n"
        "def each(problem, text, tokens):\n    return [float(t % 2) for t in tokens]\n")
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)  # slow, and seen above
    trained = []
    keep = tracerl.train
    monkeypatch.setattr(tracerl, "train", lambda trainers, *rest: (
        trained.append(trainers.model), keep(trainers, *rest))[1])
    tracerl.main(["--model", TINY, *small_data(tmp_path), *SMALL, *flags])
    metrics = lines(tmp_path / "runs/tracerl")
    assert all(line["gap_max"] < 1e-4 for line in metrics) and any("kl" in line for line in metrics)
    saved, _ = checkpoints.load_model(tmp_path / "runs/tracerl/checkpoints/step-2")
    start, _ = checkpoints.load_model(TINY)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), trained[0].parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(saved.parameters(), start.parameters()))
    readme = (ROOT / "README.md").read_text()
    for name in {name for line in metrics for name in line}:
        assert f"`{name}`" in readme, f"the README does not explain {name}"


def test_saving_changes_nothing_even_before_the_policy_has_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)
    flags = ["--model", TINY, *small_data(tmp_path), *SMALL, "--advantage=value", "--value_warmup=1"]
    for name, save_every in (("often", 1), ("once", 0)):
        tracerl.main([*flags, f"--save_every={save_every}", f"--name={name}"])
    shutil.rmtree("runs/often/checkpoints/step-2")  # and to go on from there is to have gone on
    tracerl.main([*flags, "--save_every=1", "--name=often", "--resume"])
    for name in ("", "value/"):
        often, once = (load_file(f"runs/{run}/checkpoints/step-2/{name}model.safetensors")
                       for run in ("often", "once"))
        assert all(torch.equal(often[key], once[key]) for key in once)
    assert "ratio" in (tmp_path / "runs/often/trace.html").read_text()
    with pytest.raises(ValueError, match="runs/often holds a run"):
        runs.Run("often", {})
    with runs.Run("often", {}, overwrite=True) as run:  # a new run of the same name takes nothing over
        run.begin()
        assert run.files() == ["args.json", "metrics.jsonl"] == sorted({*os.listdir("runs/often")} - {"lock"})
