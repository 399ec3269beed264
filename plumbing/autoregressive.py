"""plumbing/autoregressive.py - left-to-right models, to compare with: `python eval_math.py --ar MODEL`.

The `generate` of transformers decodes them. Their responses become Rollouts, so that the same grader judges
them and the same table shows them.
"""

import torch
import transformers

from plumbing import parallel
from plumbing.checkpoints import find_eos_ids
from plumbing.families import as_list
from rollout import Rollout


def load(path, dtype):
    """Loads an autoregressive checkpoint, for `generate` below -> model, tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    settings = model.generation_config
    settings.eos_token_id = sorted(find_eos_ids(as_list(settings.eos_token_id), tokenizer))
    if not settings.eos_token_id:
        raise ValueError(f"{path} names no eos token: write its id into generation_config.json")
    settings.pad_token_id = settings.eos_token_id[0]  # stands behind the end, where nobody reads it
    settings.repetition_penalty = 1.0  # no penalty, also if the checkpoint's own settings ask for one
    return model.to(parallel.default_device()).eval(), tokenizer


def generate(model, prompts, seeds, decoding):
    """Decodes a response to each prompt, token by token -> list[Rollout], as rollout.generate_each does.

    64 prompts at a time make a batch. The shorter ones get padding in front, which attention does not see.
    The whole batch draws from the first of its seeds.
    """
    is_greedy = decoding.temperature == 0
    sampling = dict(do_sample=False) if is_greedy else dict(
        do_sample=True, temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p)
    eos = model.generation_config.eos_token_id
    rollouts = []
    for start in range(0, len(prompts), 64):
        batch = prompts[start:start + 64]
        longest = max(map(len, batch))
        padding = [longest - len(prompt) for prompt in batch]
        tokens = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, batch)], device=model.device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=model.device)
        torch.manual_seed(seeds[start] % 2**63)
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=decoding.max_new_tokens, **sampling)
        for prompt, row in zip(batch, out[:, longest:].tolist()):
            end = next((i + 1 for i, token in enumerate(row) if token in eos), None)
            response = row[:end]
            rollouts.append(Rollout(prompt, response, len(response), list(range(1, len(response) + 1)),
                                    is_truncated=end is None))
    return rollouts
