"""Laws of the benches, bench_*.py.

    SLOW=1 pytest tests/test_benches.py      # a minute
"""

import json
import os

import pytest
import torch
from conftest import FIXTURES, ROOT, small_data

if not os.environ.get("SLOW"):
    pytest.skip("takes a minute: set SLOW=1", allow_module_level=True)

import bench_methods
import bench_update
from plumbing import runs

TINY = str(FIXTURES / "tiny")


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
