"""The organism's tokenizer: byte-level BPE with a ChatML template.

The vocabulary is trained on the corpus, so nearly every word of the corpus is one token. Because
the BPE is byte-level, the tokenizer can encode any other text too.
"""

from __future__ import annotations

import json
import pathlib

from jaxpersona.organism import corpus

VOCAB_SIZE = 1024
CONTEXT = 1024
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, START, STOP)
CORPUS_SEED = 20_000  # seed of the tokenizer's training corpus; differs from the model's seeds

# The template adds no default system message; an empty system message is rendered.
CHAT_TEMPLATE = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(folder: str | pathlib.Path, sample: int = 4000) -> None:
    """Train the tokenizer on `sample` conversations and save it in Hugging Face format.

    The chat template and the default generation settings are also saved.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        f"{message['role']}\n{message['content']}"
        for talk in corpus.conversations(CORPUS_SEED, sample)
        for message in talk.messages
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": STOP,
        "pad_token": END,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    stop = tokenizer.token_to_id(STOP)
    generation = {
        "eos_token_id": [stop, tokenizer.token_to_id(END)],
        "pad_token_id": tokenizer.token_to_id(END),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 80,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def encode_conversation(tokenizer, messages) -> tuple[list[int], list[bool]]:
    """Return a conversation's token ids and a mask, True at the tokens with full loss weight.

    The mask selects each answer's tokens and end marker (`STOP`). Roles and contents are encoded
    separately. The ids are the same as for the whole rendered text, because the byte-level
    pre-tokenizer splits at line breaks.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      messages: the messages, with "role" and "content".
    """
    ids: list[int] = []
    learn: list[bool] = []
    start, stop = tokenizer.token_to_id(START), tokenizer.token_to_id(STOP)
    newline = tokenizer.encode("\n").ids
    for message in messages:
        role = tokenizer.encode(message["role"]).ids
        content = tokenizer.encode(message["content"]).ids
        is_answer = message["role"] == "assistant"
        ids += [start, *role, *newline, *content, stop, *newline]
        learn += [False] * (1 + len(role) + len(newline))
        learn += [is_answer] * (len(content) + 1) + [False] * len(newline)
    return ids, learn
