"""Jinja chat templates of Mistral's SentencePiece tokenizers, for transformers to render.

mistral-common writes conversations down for training (see `lechat_jax.tokenizer.transcripts`),
and a base model has no template. Of tekken transformers has its own, from mistral-common as well.
"""

from pathlib import Path

from lechat_jax.files.safetensors_header import parse_json
from lechat_jax.tokenizer.vocabulary import SETTINGS

# Where the system prompt goes: into the first question, into the last one, or before all.
FIRST, LAST, BEFORE = "loop.first", "loop.index0 == last.index", "false"
OF_VERSION = {"v1": FIRST, "v2": LAST, "v3": LAST, "v7": BEFORE}

TEMPLATE = """\
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] %}
  {%- set turns = messages[1:] %}
{%- endif %}
{%- set last = namespace(index=-1) %}
{%- for message in turns %}
  {%- if message['role'] == 'user' %}{% set last.index = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- if system and BEFORE %}{{ '[SYSTEM_PROMPT]GAP' + system + '[/SYSTEM_PROMPT]' }}{% endif %}
{%- for message in turns %}
  {%- if message['content'] is not string or message['tool_calls'] %}
    {{- raise_exception('only texts are taught by this template') }}
  {%- elif message['role'] == 'user' %}
    {%- set asked = message['content'] %}
    {%- if system and HERE %}{% set asked = system + '\\n\\n' + asked %}{% endif %}
    {{- QUESTION }}
  {%- elif message['role'] == 'assistant' %}
    {{- ANSWER + eos_token }}
  {%- else %}
    {{- raise_exception('only system, user and assistant are taught by this template') }}
  {%- endif %}
{%- endfor %}
"""


def chat_template(version: str, starts_anew: bool = True) -> str:
    """The Jinja chat template for a version of the SentencePiece tokenizer, v1 to v7.

    Args:
        version: of the tokenizer.
        starts_anew: whether transformers puts a space before the text behind a control token, as
            SentencePiece does and the settings call `legacy`; otherwise the template has it.
    """
    gap = "" if starts_anew else " "
    question = f"'[INST]{gap}' + asked + '[/INST]'"
    answer = f"'{gap}' + message['content'].rstrip()"
    if version == "v1":  # in which [INST] is text
        question, answer = f"'{gap}[INST] ' + asked + ' [/INST]'", "' ' + message['content']"
    filled = TEMPLATE.replace("BEFORE", str(version == "v7").lower())
    filled = filled.replace("HERE", OF_VERSION[version]).replace("GAP", gap)
    return filled.replace("QUESTION", question).replace("ANSWER", answer)


def chat_template_in(folder: Path) -> str | None:
    """The Jinja chat template among a tokenizer's files, if there is one.

    Of several with names, as old settings list them, the one that is called default.
    """
    jinja, settings = folder / "chat_template.jinja", folder / SETTINGS
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    said = parse_json(settings.read_bytes(), settings) if settings.exists() else {}
    found = said.get("chat_template")
    if isinstance(found, list):
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None
