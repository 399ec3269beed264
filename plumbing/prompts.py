"""plumbing/prompts.py - how problems become prompts: chat templates, and token ids."""

from dataclasses import dataclass

from plumbing import data
from plumbing.flags import Settings, setting

PROMPT_STYLES = ("chat", "trado", "trado_think", "think", "no_think", "plain")


@dataclass
class Prompting(Settings):
    """How problems become prompts. A model must be trained and tested on the same kind of prompt."""

    max_prompt_tokens: int = setting(784, "longer prompts are skipped, and their number is printed", low=1)
    prompt_style: str = setting(
        "chat", "chat: the chat template; trado: chat without the last newline; think: chat, then <think>; "
        "trado_think: trado, then <think>; no_think: chat with thinking off; plain: no template",
        choices=PROMPT_STYLES)
    instruction: str = setting(
        "\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "text that follows each problem; use an empty one if the data hold whole prompts")


def encode_prompts(problems, tokenizer, prompting=Prompting()):
    """Sets Problem.tokens -> (problems that fit, how many do not).

    A model is good at prompts like those it was trained on. One newline too many can cost accuracy. TraDo was
    trained on prompts that end with the word "assistant", so there is a style for it.
    """
    style = prompting.prompt_style
    if style != "plain" and not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use --prompt_style plain")
    switch = dict(enable_thinking=False) if style == "no_think" else {}  # some templates ignore it
    chats = [data.as_chat(p.problem, prompting.instruction) for p in problems]
    begin = []
    if style == "plain":
        texts = ["\n".join(message["content"] for message in chat) for chat in chats]
        # Some tokenizers begin every text with a special token (BOS), as a template does.
        begin = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    else:  # all in one call: one by one, 20,000 problems would take several times as long
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False, **switch)
    if style in ("trado", "trado_think"):
        texts = [text.rstrip() for text in texts]
    if style in ("think", "trado_think"):  # unless the template has written it already
        think = "<think>\n" if style == "think" else "<think>"
        texts = [text if text.rstrip().endswith("<think>") else text + think for text in texts]
    for p, tokens in zip(problems, encode(texts, tokenizer)):
        p.tokens = tokens if tokens[:1] == begin else begin + tokens
    fitting = [p for p in problems if len(p.tokens) <= prompting.max_prompt_tokens]
    if not fitting:
        raise ValueError(f"none of {len(problems)} prompts has at most {prompting.max_prompt_tokens} tokens: "
                         "raise --max_prompt_tokens")
    return fitting, len(problems) - len(fitting)


def encode_solutions(problems, tokenizer, config):
    """Problems with prompts and worked solutions -> token ids of each solution, without eos.

    An eos at the end of a solution is removed, since sft.py adds one. A <think> at its beginning is removed
    if the prompt ends with one. ValueError for tokens that a model cannot learn to write.
    """
    ends = tuple(filter(None, tokenizer.convert_ids_to_tokens(list(config.eos_ids))))
    texts = []
    for p in problems:
        text = p.solution
        while text.rstrip().endswith(ends):
            text = text.rstrip().removesuffix(next(end for end in ends if text.rstrip().endswith(end)))
            p.step_map = p.step_map and p.step_map[:-1]  # eos is one token
        if text.startswith("<think>") and not p.step_map:  # a step map has one number for each token
            prompt_end = tokenizer.decode(p.tokens[-4:])
            if prompt_end.rstrip().endswith("<think>"):
                text = text.removeprefix("<think>\n" if prompt_end.endswith("\n") else "<think>")
        texts.append(text)
    encoded = encode(texts, tokenizer)
    for p, tokens in zip(problems, encoded):
        name = f"the solution of {str(p.problem)[:80]!r}"
        if {config.mask_id, *config.eos_ids} & {*tokens}:
            raise ValueError(f"{name} holds the mask token, or an eos before its end: take it out")
        largest = max(p.tokens + tokens)
        if largest >= config.vocab_size:
            raise ValueError(f"{name} or its prompt has the token id {largest}, outside the vocabulary of "
                             f"{config.vocab_size} tokens: is this the model's tokenizer?")
    return encoded


def encode(texts, tokenizer):
    """Texts -> lists of token ids. ValueError where the tokenizer does not know a character.

    That character would be lost. Byte-level tokenizers (Qwen, LLaDA) know all; the tiny one has 18 tokens.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{text[:80]!r} holds half of a character ({error}): mend the data") from None
    encoded = []
    for start in range(0, len(texts), 1000):  # in portions: one call needs about 150 bytes for each token
        encoded += tokenizer(texts[start:start + 1000], add_special_tokens=False).input_ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    for text, tokens in zip(texts, encoded):
        if unknown is not None and unknown in tokens:
            raise ValueError(f"the tokenizer does not know all characters of {text[:80]!r}: use other data "
                             "or another --model")
    return encoded
