"""plumbing/autoregressive.py - a yardstick: left-to-right models, by transformers' own generate."""

import torch
import transformers

from plumbing import parallel


def responses(model, tokenizer, problems, seeds, strategy, args):
    """Responses to problems, as dicts, on every process: left-padded batches, token by token."""
    eos = model.generation_config.eos_token_id
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    settings = dict(do_sample=False) if args.temperature == 0 else dict(
        do_sample=True, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    settings["repetition_penalty"] = 1.0  # a checkpoint's generation_config may hold another
    own, own_seeds, out = parallel.share(problems), parallel.share(seeds), []
    size = args.slots or 64
    for start in range(0, len(own), size):
        batch = [{"input_ids": p.tokens} for p in own[start:start + size]]
        inputs = tokenizer.pad(batch, return_tensors="pt").to(model.device)
        torch.manual_seed(own_seeds[start])
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens,
                                pad_token_id=tokenizer.pad_token_id, **settings)
        for row in tokens[:, inputs["input_ids"].shape[1]:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in eos), None)
            length = end or len(row)
            out.append(dict(
                response=tokenizer.decode(row[:length], skip_special_tokens=True), length=length,
                truncated=end is None, decoded=length, step_map=list(range(1, length + 1))))
    return parallel.gather(out)


def load(path):
    """A model and tokenizer for `responses`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.to(parallel.default_device()).eval(), tokenizer
