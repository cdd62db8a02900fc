"""Chat templates by name, for base models whose tokenizer has the tokens and no template. They know no tools."""

_PROMPT = "{% if add_generation_prompt %}"

BUILT_IN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        + _PROMPT
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        + _PROMPT
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
        "{{ raise_exception('Only the roles user and assistant are supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}" + _PROMPT + "<start_of_turn>model\n{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
        "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
        "{% elif m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n"
        "{% else %}{{ raise_exception('Only the roles system, user and assistant are supported') }}{% endif %}"
        "{% endfor %}" + _PROMPT + "### Response:\n{% endif %}"
    ),
}
