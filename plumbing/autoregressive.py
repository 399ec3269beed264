"""plumbing/autoregressive.py - a yardstick: left-to-right models, by transformers' own generate."""

import torch
import transformers

from plumbing import parallel
from rollout import Rollout


def load(path):
    """A model and tokenizer for `generate`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    settings = model.generation_config
    eos = settings.eos_token_id
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    settings.eos_token_id = sorted({token for token in ids if token is not None})
    settings.pad_token_id = settings.eos_token_id[0]  # behind the end, where nobody looks
    settings.repetition_penalty = 1.0  # the checkpoint may hold another
    return model.to(parallel.default_device()).eval(), tokenizer


def generate(model, prompts, seeds, decoding):
    """Rollouts of prompts, as rollout.generate_each gives them: left-padded batches, token by token."""
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
