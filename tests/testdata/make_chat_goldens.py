#!/usr/bin/env python3
"""Makes chat_goldens.json: conversations as transformers renders and tokenizes them with the chat
templates of the Llama families (those of 3.1 and 3.2 without their parts for tools).

usage: make_chat_goldens.py LLAMA3_TOKENIZER_JSON
  LLAMA3_TOKENIZER_JSON   that of deploy/demo/model, which has Llama 3's control tokens
Made with transformers 5.23.0.
"""
import json
import pathlib
import sys

from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
    "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}")

LLAMA3_ALWAYS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")

LLAMA3 = LLAMA3_ALWAYS.replace(
    "{{ '<|start_header_id|>assistant",
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant") + "{% endif %}"

FIXED_DATE = '{%- set date_string = "26 Jul 2024" %}\n'
TODAY = ('{%- if strftime_now is defined %}\n{%- set date_string = strftime_now("%d %b %Y") %}\n'
         '{%- else %}\n' + FIXED_DATE + '{%- endif %}\n')

LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    DATE
{%- endif %}
{#- The system message goes into a block of its own, don't repeat it. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama3_always": LLAMA3_ALWAYS,
    "llama3.1": LLAMA31.replace("DATE", FIXED_DATE),
    "llama3.2": LLAMA31.replace("DATE", TODAY),
}


def conversation(text):
    """"s:..|u:..|a:.." as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[part[0]], "content": part[2:]} for part in text.split("|", -1)]


CONVERSATIONS = [conversation(c) for c in [
    "u:Hello", "u:", "u:  \n padded \t\n", "s:Be brief.|u:Hello", "s:|u:Hello", "s:  |u: ",
    "u:Hi|a:Hello!|u:How are you?", "s:Be brief.|u:Hi|a:  Hello!\n|u:How are you?|a: Well.",
    "u:one|a:two|u:three|a:four|u:five", "u:\u4e2d\u6587 \U0001f600 e\u0301|a:\u00e9\u00a0",
    "u:\u3000\u2003\u00a0x\u00a0\u2003", "u:\x1c\x1d\x1e\x1fx\x1f\x85", "u:\u200bx\ufeff",
    "u:line\n\nline\r\n\r\n", "u:\0 nul \0", "u:[INST] not a turn [/INST]",
    "s:<<SYS>>|u:<</SYS>>", "u:\"quotes\" 'and' {{ braces }} {% tag %} {# note #}",
    "s:  indented system  \n|u:x", "u:" + "long " * 200,
]]
FREE_ORDER = [conversation(c) for c in [
    "a:first", "u:a|u:b", "s:a|s:b", "u:a|s:b|a:c", "s:only", "a:x|a:y|s:z"]]
WRONG_ORDER = [conversation(c) for c in ["a:first", "u:a|u:b", "u:a|a:b|a:c", "s:x|a:y"]]


def main():
    llama2 = PreTrainedTokenizerFast(tokenizer_file=str(HERE / "tokenizer_llama2.json"),
                                     bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    llama3 = PreTrainedTokenizerFast(tokenizer_file=sys.argv[1], bos_token="<|begin_of_text|>",
                                     eos_token="<|end_of_text|>")
    families = []
    for name, template in TEMPLATES.items():
        tokenizer = llama2 if name == "llama2" else llama3
        cases = []
        for messages in CONVERSATIONS + ([] if name == "llama2" else FREE_ORDER):
            for prompt in (True, False):
                options = dict(chat_template=template, add_generation_prompt=prompt)
                if name == "llama3.2":
                    options["date_string"] = "05 Mar 2025"
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert ids == tokenizer.apply_chat_template(
                    messages, tokenize=True, **options)["input_ids"]
                cases.append({"messages": messages, "add_generation_prompt": prompt, "text": text,
                              "ids": ids})
        families.append({"name": name, "template": template, "cases": cases})
    refused = []
    for messages in WRONG_ORDER:
        try:
            llama2.apply_chat_template(messages, chat_template=LLAMA2, tokenize=False)
        except Exception as error:
            assert "must alternate" in str(error)
            refused.append(messages)
    assert len(refused) == len(WRONG_ORDER)
    text = json.dumps({"families": families, "wrong_order": refused}, separators=(",", ":"))
    (HERE / "chat_goldens.json").write_text(text + "\n")
    print(len(text))


main()
