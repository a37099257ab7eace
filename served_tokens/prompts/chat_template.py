"""The chat template as a function: the embedded one of Qwen3, a .jinja file, or that of a model."""

import datetime
import functools
import json
import random
import string
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from served_tokens.marks import BLOCK_END, BLOCK_START, CONTROL_TOKENS, TrajectoryError, map_texts

QWEN3 = Path(__file__).resolve().parents[2] / "chat_templates" / "qwen3.jinja"
QUERY = {"role": "user", "content": "q"}


class ChatTemplate(NamedTuple):
    """A chat template, on whatever machine."""

    name: str
    text: str
    special_tokens: tuple = ()  # (name, token), as the template may use them
    control_tokens: tuple = CONTROL_TOKENS  # that no text of a trajectory may hold, with all of the model's own
    trusted: bool = False  # the embedded one, which is ours


def read_chat_template(name: str) -> ChatTemplate:
    """`name` is a `.jinja` file, a local model directory or a Hub model id. Ends with a message where there is none."""
    if name.endswith(".jinja"):
        try:
            text, trusted = Path(name).read_text(encoding="utf-8"), Path(name).resolve() == QWEN3
            return ChatTemplate(name, text, trusted=trusted)
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"{name}: cannot read the chat template ({error})") from None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # unset, it would ask on the terminal
        template = tokenizer.get_chat_template()
    except Exception as error:  # transformers raises many kinds; each means that there is no template to be had
        raise SystemExit(f"{name}: no chat template to be had from this model ({error})") from None
    own = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control_tokens = dict.fromkeys(filter(None, [*CONTROL_TOKENS, *own, *tokenizer.all_special_tokens]))
    special_tokens = tuple(
        (key, str(token)) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    )
    return ChatTemplate(name, template, special_tokens, tuple(control_tokens))


@functools.cache
def load_chat_template(template: ChatTemplate):
    """render(messages, tools, add_generation_prompt=False, **variables) -> str; made once in each process.

    A template that is not trusted is rendered in Jinja's sandbox, as transformers does
    (utils/chat_template_utils.py), without the import of transformers. render raises TrajectoryError.
    """
    make = jinja2.Environment if template.trusted else jinja2.sandbox.ImmutableSandboxedEnvironment
    environment = make(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, documents=None)
    try:
        compiled = environment.from_string(template.text)
    except Exception as error:  # a template may fail in any way, here and below
        raise SystemExit(f"{template.name}: not a valid Jinja template ({error})") from None

    def render(messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool = False, **variables) -> str:
        variables |= dict(template.special_tokens, messages=messages, tools=tools)
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return compiled.render(variables)
        except Exception as error:
            known = isinstance(error, (jinja2.TemplateError, ValueError))
            what = str(error) if known else f"{type(error).__name__}: {error}"
            raise TrajectoryError(f"the chat template refuses the messages: {what}") from None

    try:
        split_blocks(render([QUERY], None, add_generation_prompt=True))
    except TrajectoryError as error:
        raise SystemExit(f"{template.name}: {error}") from None
    return render


def split_blocks(rendered: str) -> list[tuple[str, str]]:
    """[(role, text)] of a ChatML rendering; an open last block is left out.

    Its texts hold no control tokens: see `served_trajectory` and `with_stand_ins`.
    """
    opening, *blocks = rendered.split(BLOCK_START)
    split = []
    for position, block in enumerate(blocks):
        role, _, text = block.partition("\n")
        if text.endswith(BLOCK_END + "\n"):
            split.append((role, text[: -len(BLOCK_END) - 1]))
        elif not (role == "assistant" and position == len(blocks) - 1):
            break
    else:
        if not opening and blocks:
            return split
    raise TrajectoryError(f"the chat template is not ChatML: it does not render {BLOCK_START}role … {BLOCK_END} blocks")


def with_stand_ins(messages: list[dict], tools: list[dict] | None) -> tuple:
    """The same with plain words in place of the control tokens that ChatML is split at, so that a rendering can be
    split.

    Returns (messages, tools, reveal): reveal(text) puts the tokens back; it is None where there are none. The words are
    as long as the tokens, occur nowhere else, and cannot overlap one another.
    """
    text = json.dumps([messages, tools], ensure_ascii=False, default=str)
    if BLOCK_START not in text and BLOCK_END not in text:
        return messages, tools, None
    words = {}
    for token, opening in ((BLOCK_START, "Qs"), (BLOCK_END, "Qe")):
        while (word := opening + "".join(random.choices(string.ascii_lowercase, k=len(token) - 2))) in text:
            pass
        words[token] = word

    def hide(text: str) -> str:
        return text.replace(BLOCK_START, words[BLOCK_START]).replace(BLOCK_END, words[BLOCK_END])

    def reveal(text: str) -> str:
        return text.replace(words[BLOCK_START], BLOCK_START).replace(words[BLOCK_END], BLOCK_END)

    return map_texts(messages, hide), map_texts(tools, hide), reveal


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which some templates put around assistant text, renders its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    if not (ensure_ascii or sort_keys) and indent is None and separators is None:
        return _encode(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every call


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
