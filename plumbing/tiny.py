"""plumbing/tiny.py - makes the tiny model for arithmetic and Sudoku: a small checkpoint like any other."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from model import BlockDiffusionLM
from plumbing import checkpoints, parallel


def tiny_tokenizer():
    """A Hugging Face tokenizer: one token per character of the embedded tasks, and one for \\boxed{.

    Its chat template keeps only the first line of a message. So it drops the --instruction, which stands in a
    line of its own behind the problem. The words of the instruction would be unknown to a model of 18 tokens.
    """
    # 18 tokens: 3 special ones, 10 digits, + = ; and what an answer is boxed with.
    words = ["<pad>", "<eos>", "<mask>", *"0123456789", "+", "=", ";", "\\boxed{", "}"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    # \boxed{ is one token, all else one character each.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>",
                                        eos_token="<eos>", mask_token="<mask>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('\\n')[0] }}{% endfor %}"
    return tokenizer


def new_model(args):
    """A new tiny model on this process's device, and its tokenizer. It is sharded over the processes.

    args: the flags of sft.py. ValueError for flags that only mean something for a checkpoint.
    """
    if args.lora_rank or args.gradient_checkpointing or args.dtype != "float32":
        raise ValueError("--lora_rank, --gradient_checkpointing and --dtype need a checkpoint: give --model")
    model = tiny_model(args.seed, args.block_size or 4, args.attention or "block")
    model.to(parallel.default_device())
    parallel.shard(model, model.layers)
    return model, tiny_tokenizer()


def tiny_model(seed=0, block_size=4, attention="block"):
    """A randomly initialised model for the tokenizer above, about 100k parameters, float32 on the CPU."""
    num_layers = 2
    hidden_size = 64
    vocab_size = len(tiny_tokenizer())
    # The same fields as in a published config.json, so that the tiny model goes through the same code as a
    # real one.
    source = dict(block_size=block_size, mask_token_id=2, eos_token_id=1, pad_token_id=0,
                  rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu")
    if attention == "full":
        # LLaDA has no grouped heads, and the head is not tied to the embedding.
        source.update(model_type="llada", d_model=hidden_size, n_layers=num_layers, n_heads=4, n_kv_heads=4,
                      mlp_hidden_size=3 * hidden_size, embedding_size=vocab_size, weight_tying=False)
    else:
        source.update(model_type="sdar", hidden_size=hidden_size, num_hidden_layers=num_layers,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=hidden_size // 4,
                      intermediate_size=3 * hidden_size, vocab_size=vocab_size, tie_word_embeddings=False,
                      architectures=["SDARForCausalLM"])
    model = BlockDiffusionLM(checkpoints.read_config(source))
    initialize(model, seed)
    return model


def initialize(model, seed):
    """Fills all weights: norms 1, biases 0, matrices N(0, 0.02), as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)  # not torch's global one: same seed, same weights
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        else:
            # Outputs into the residual stream start smaller: with L layers 2 L of them add up.
            is_residual = "o_proj" in name or "down_proj" in name
            std = 0.02 / (2 * model.config.num_layers) ** 0.5 if is_residual else 0.02
            nn.init.normal_(p, std=std, generator=generator)
