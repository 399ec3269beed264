"""Traces of other engines are replayed, and a mistake is named."""

import dataclasses
import json

import pytest
import torch
from conftest import PLAIN, decode, random_model, random_prompts

from plumbing import check

SETTINGS = dict(max_new_tokens=14, eos_ids=(1,), seed=3)


def write(path, rollouts):
    rows = [dict(prompt=r.prompt, response=r.response, step_map=r.step_map, logp=r.logp) for r in rollouts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recorded_with(model, rollouts, **mistake):
    """The same traces as an engine with this mistake would have recorded them."""
    found = []
    for r in rollouts:
        zero = dataclasses.replace(r, logp=[0.0] * len(r.response))
        numbers = check.differences(model, [zero], PLAIN, **mistake).tolist()  # logp - 0
        known = len(numbers)
        found.append(dataclasses.replace(r, response=r.response[:known], step_map=r.step_map[:known],
                                         logp=numbers))
    return found


@pytest.mark.parametrize("mistake, text", [
    (dict(), "The replay agrees"),
    (dict(is_cut_at_response=True), "Cause: blocks were cut at the start of the response"),
    (dict(is_cut_at_eos=True), "Cause: the last block was cut at eos"),
    (dict(block_size=2), "Cause: blocks were of size 2, not 4 (--block_size 2)"),
    (dict(block_size=1), "Cause: blocks were of size 1, not 4"),  # from left to right, without any masks
    (dict(temperature=0.7), "Cause: the log-probabilities were recorded at temperature 0.7, not 1.0"),
])
def test_a_mistake_of_another_engine_is_named(mistake, text, tmp_path, capsys):
    model = random_model()
    rollouts = decode(model, random_prompts([5, 9, 6, 8, 11]), **SETTINGS)
    path = write(tmp_path / "traces.jsonl", recorded_with(model, rollouts, **mistake))
    check.check(model, path, PLAIN, 1.0)
    out = capsys.readouterr().out
    assert text in out
    assert out.count("Cause") == bool(mistake)


def test_a_last_block_without_the_tokens_behind_eos_is_named(tmp_path, capsys):
    """The engine saw whole blocks, and handed over what it had up to eos."""
    model = random_model()
    rollouts = decode(model, random_prompts([5, 9, 6, 8, 11]), **SETTINGS)
    cut = [dataclasses.replace(r, response=r.response[:r.num_tokens], step_map=r.step_map[:r.num_tokens],
                               logp=r.logp[:r.num_tokens]) for r in rollouts]
    assert any(r.num_tokens < len(r.response) for r in rollouts)
    check.check(model, write(tmp_path / "traces.jsonl", cut), PLAIN, 1.0)
    assert "Cause: perhaps tokens behind eos are missing" in capsys.readouterr().out


def test_numbers_of_a_filtered_distribution_are_suspected(tmp_path, capsys):
    model = random_model()
    rollouts = decode(model, random_prompts([5, 9, 6, 8, 11]), top_k=5, **SETTINGS)
    for r in rollouts:
        r.logp = torch.tensor(r.confidence).log().tolist()
    check.check(model, write(tmp_path / "traces.jsonl", rollouts), PLAIN, 1.0)
    assert "Cause: perhaps the log-probabilities were recorded after top-k" in capsys.readouterr().out


def test_a_line_that_is_no_trace_is_named(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"prompt": [3], "response": [4, 5], "step_map": [1], "logp": [-1, -1]}\n')
    with pytest.raises(ValueError, match="row 1: 2 tokens, 1 steps and 2 log-probabilities"):
        check.read_traces(str(path), random_model().config)
    path.write_text('{"prompt": [3], "response": null, "step_map": [1], "logp": [-1]}\n')
    with pytest.raises(ValueError, match="row 1: this is no JSON object with prompt, response"):
        check.read_traces(str(path), random_model().config)
    for line in ('"prompt": "1+1=", "logp": [-1]', '"prompt": [3], "logp": [null]'):
        path.write_text(f'{{{line}, "response": [4], "step_map": [1]}}\n')
        with pytest.raises(ValueError, match="row 1: this is no JSON object with prompt, response"):
            check.read_traces(str(path), random_model().config)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no traces"):
        check.read_traces(str(path), random_model().config)
    path.write_text('{"prompt": [3], "response": [4], "step_map": [1], "logp": [-1]}\n\n')
    assert len(check.read_traces(str(path), random_model().config)) == 1
