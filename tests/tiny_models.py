"""Tiny causal language models of other families than ChatGLM3's: byte-level BPE, random weights, their chat formats.

They lie on disk as such models are published. "qwen3": one embedding matrix for input and output, more rows than ids,
no beginning-of-sequence token, tokens of markup that are not special. "llama": two matrices with a row for every id, a
beginning-of-sequence token.
"""

import json
from functools import cache
from pathlib import Path

from tests.helpers import TEXTS

JAPANESE = [
    "山の上の小さな町に、木の人形を作るおじいさんが住んでいました。",
    "コーヒーの香りがする喫茶店には、猫が三匹いました。",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
VOCAB_SIZE = 410  # of ordinary tokens: 256 bytes and 154 merges, few of them Japanese

QWEN3_CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools, one a line:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nCall one within <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.user and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
# kind -> special tokens and tokens of markup, behind the ordinary ones; settings of the tokenizer
SPECIAL = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": [
        *(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        )
    ],
}
MARKUP = {
    "qwen3": ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
    "llama": [],
}
SETTINGS = {
    "qwen3": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN3_CHAT_TEMPLATE),
    "llama": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA_CHAT_TEMPLATE),
}


def tiny_tokenizer(kind):
    """A byte-level BPE tokenizer of a few hundred ids in the style of Qwen3 or Llama 3."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = dict(clean_up_tokenization_spaces=False, padding_side="left", **SETTINGS[kind])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_tokenizer_json(kind)), **settings)


@cache
def _tokenizer_json(kind):
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama"))
    if kind == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    pattern = Regex(SPLIT.replace("{1,DIGITS}", "" if kind == "qwen3" else "{1,3}"))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_alone])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator(
        [*TEXTS, *JAPANESE],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            max_token_length=6,  # bytes; the few texts would become whole tokens
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[kind]])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP[kind]])
    if kind == "llama":
        bos = SPECIAL[kind][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def tiny_model(directory, kind):
    """Saves a model of two layers of width 32 with random weights, its tokenizer and its generation settings."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    directory = Path(directory)
    tokenizer = tiny_tokenizer(kind)
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = {**json.loads(file.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    torch.manual_seed(0)
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if kind == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    rows = len(tokenizer) if kind == "llama" else -(-len(tokenizer) // 64) * 64 + 64
    pad = tokenizer.pad_token_id if kind == "qwen3" else None
    model = model_class(
        config_class(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            tie_word_embeddings=kind == "qwen3",
        )
    )
    for parameter in model.parameters():  # nothing may hide behind a 0 or a 1
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():  # rows without an id, which no model that was trained ever chooses
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[len(tokenizer) :] = layer.weight[: len(tokenizer)].mean(dim=0)
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>" if kind == "qwen3" else "<|end_of_text|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_text],
        pad_token_id=pad,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    model.save_pretrained(directory)
    return directory
