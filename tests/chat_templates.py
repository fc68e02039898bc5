"""Chat templates with the same structure as those of model families, and a tokenizer for them.

For each template there is a plain Python implementation (`REFERENCE`): a list of segments (role or
None for template text, message number, text). It is the reference for spans.
"""

from __future__ import annotations

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
           "[INST]", "[/INST]"]
TAGS = ["<think>", "</think>"]

CHATML = r"""
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""

QWEN2 = r"""
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\nYou help by default.<|im_end|>\n' }}
{%- endif -%}
""" + CHATML

QWEN3 = r"""
{%- set ns = namespace(asked=messages|length - 1, found=false) -%}
{%- for m in messages[::-1] -%}
  {%- if not ns.found and m.role == 'user' and not (m.content.startswith('<tool_response>')
      and m.content.endswith('</tool_response>')) -%}
    {%- set ns.found = true -%}{%- set ns.asked = messages|length - 1 - loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role != 'assistant' -%}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- else -%}
    {%- set said = m.content -%}{%- set thought = '' -%}
    {%- if '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set said = said.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if loop.index0 > ns.asked and (loop.last or thought) -%}
      {{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n'
         + said.lstrip('\n') + '<|im_end|>\n' }}
    {%- else -%}
      {{ '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and not enable_thinking -%}
    {{ '<think>\n\n</think>\n\n' }}
  {%- endif -%}
{%- endif -%}
"""

LLAMA3 = r"""
{{- bos_token -}}
{%- set system = '' -%}{%- set talk = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content | trim -%}{%- set talk = messages[1:] -%}
{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\n\nKnowledge ends somewhere.\n\n' }}
{{- system + '<|eot_id|>' -}}
{%- for m in talk -%}
  {{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

GEMMA2 = r"""
{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif -%}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate, user first') }}
  {%- endif -%}
  {{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n'
     + m.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}
"""

# Unlike the four above, this template moves the system prompt to the last user message and adds no
# generation prompt.
MISTRAL = r"""
{{- bos_token -}}
{%- set talk = messages -%}
{%- if messages[0].role == 'system' %}{% set talk = messages[1:] %}{% endif -%}
{%- for m in talk -%}
  {%- if m.role == 'user' -%}
    {{- '[INST] ' -}}
    {%- if loop.last and messages[0].role == 'system' -%}
      {{ messages[0].content + '\n\n' }}
    {%- endif -%}
    {{ m.content + '[/INST]' }}
  {%- else -%}
    {{ ' ' + m.content + eos_token }}
  {%- endif -%}
{%- endfor -%}
"""

# Opens a thinking block in the generation prompt, and removes thinking blocks from past turns.
DEEPSEEK = r"""
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif -%}
"""

TEMPLATES = {"chatml": CHATML, "qwen2": QWEN2, "qwen3": QWEN3, "llama3": LLAMA3, "gemma2": GEMMA2,
             "mistral": MISTRAL, "deepseek": DEEPSEEK, "base": None}
BOS = {"llama3": "<|begin|>", "gemma2": "<bos>", "mistral": "<bos>", "base": "<bos>"}
TRIMS = ("llama3", "gemma2")


def make_tokenizer(family: str):
    """Train a byte-level BPE tokenizer that can merge punctuation with the line breaks after it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors, trainers
    from tokenizers import pre_tokenizers as split_by
    from transformers import PreTrainedTokenizerFast

    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = split_by.Sequence([
        split_by.Split(split, "isolated"),
        split_by.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    core.decoder = decoders.ByteLevel()
    # Llama's tokenizer trims whitespace from its offsets; Qwen's does not.
    offsets = processors.ByteLevel(trim_offsets=family in TRIMS)
    core.post_processor = offsets
    text = ["You are a pirate.\n\nWho are you?\n\n", "user\nassistant\nsystem\nmodel\n\n\n",
            "I am a helpful pirate.\n", "the sea the ship the sea  the ship\n\n"] * 20
    core.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(split_by.ByteLevel.alphabet())))
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    if family == "base":  # otherwise the template adds the start-of-text token
        bos = BOS[family]
        core.post_processor = processors.Sequence([offsets, processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])])
    names = {"bos_token": BOS[family]} if family in BOS else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATES[family],
                                   eos_token="<eos>", clean_up_tokenization_spaces=False, **names)


def reference(family: str, messages, reply: bool):
    """Render a conversation without thinking tags as segments (role or None, message, text)."""
    out = []
    system = messages[0] if messages[0]["role"] == "system" else None
    first = int(system is not None)

    def say(turn, head, tail, text=None):
        text = messages[turn]["content"] if text is None else text
        out.extend([(None, turn, head), (messages[turn]["role"], turn, text), (None, turn, tail)])

    if family in ("chatml", "qwen2", "qwen3"):
        if family == "qwen2" and not system:
            out.append((None, 0, "<|im_start|>system\nYou help by default.<|im_end|>\n"))
        for turn, m in enumerate(messages):
            block = "<think>\n\n</think>\n\n"
            last = family == "qwen3" and m["role"] == "assistant" and turn == len(messages) - 1
            text = m["content"].lstrip("\n") if last else None
            say(turn, f"<|im_start|>{m['role']}\n" + block * last, "<|im_end|>\n", text)
        cue = "<|im_start|>assistant\n" + (block if family == "qwen3" else "")
    elif family == "llama3":
        head = "<|start_header_id|>{}<|end_header_id|>\n\n"
        start = "<|begin|>" + head.format("system") + "Knowledge ends somewhere.\n\n"
        if system:
            say(0, start, "<|eot_id|>", system["content"].strip())
        else:
            out.append((None, 0, start + "<|eot_id|>"))
        for turn, m in list(enumerate(messages))[first:]:
            say(turn, head.format(m["role"]), "<|eot_id|>", m["content"].strip())
        cue = head.format("assistant")
    elif family == "gemma2":
        # An empty system prompt renders as nothing, so <bos> belongs to the next message.
        out.append((None, int(system is not None and not system["content"].strip()), "<bos>"))
        for turn, m in list(enumerate(messages))[first:]:
            name = "model" if m["role"] == "assistant" else "user"
            text = m["content"].strip()
            head = f"<start_of_turn>{name}\n"
            if turn == 1 and system and system["content"].strip():
                said = system["content"].lstrip() if text else system["content"].strip()
                out.extend([(None, 0, head), ("system", 0, said)])
                head = "\n\n" if text else ""
                text = m["content"].rstrip()
            say(turn, head, "<end_of_turn>\n", text)
        cue = "<start_of_turn>model\n"
    return [*out, (None, len(messages), cue)] if reply else out
