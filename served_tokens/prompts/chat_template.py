"""The chat template as a function: the embedded one of Qwen3, a .jinja file, or that of a model."""

import functools
import hashlib
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from served_tokens.marks import BLOCK_END, BLOCK_START, CONTROL_TOKENS, TrajectoryError

QWEN3 = Path(__file__).resolve().parents[2] / "chat_templates" / "qwen3.jinja"
RENDERS_KEPT = 64  # in a process, of a template with other kwargs each: those of rows may be many
OPENING = re.compile(r"(<[^<>\s]+>)?")  # what may come before the first block: a token such as <s>
QUERY = {"role": "user", "content": "q"}
NOT_CHATML = f"the chat template is not ChatML: it does not render {BLOCK_START}role … {BLOCK_END} blocks"


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
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"{name}: cannot read the chat template ({error})") from None
        return ChatTemplate(name, text, trusted=Path(name).resolve() == QWEN3)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # unset, it would ask on the terminal
        text = tokenizer.get_chat_template()
    except Exception as error:  # transformers raises many kinds; each means that there is no template to be had
        raise SystemExit(f"{name}: no chat template to be had from this model ({error})") from None
    named = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control_tokens = dict.fromkeys(filter(None, [*CONTROL_TOKENS, *added, *tokenizer.all_special_tokens]))
    return ChatTemplate(name, text, special_tokens=tuple(named.items()), control_tokens=tuple(control_tokens))


@functools.lru_cache(maxsize=RENDERS_KEPT)
def load_chat_template(template: ChatTemplate, kwargs: str = "{}"):
    """render(messages, tools, add_generation_prompt=False, **variables) -> str; made once in each process.

    A template that is not trusted is rendered in Jinja's sandbox, as transformers does, without the import of it.
    render raises TrajectoryError, and so does this where the template refuses the kwargs, those of requests as JSON.
    """
    make = jinja2.Environment if template.trusted else jinja2.sandbox.ImmutableSandboxedEnvironment
    environment = make(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=time.strftime, documents=None)
    try:
        compiled = environment.from_string(template.text)
    except Exception as error:  # a template may fail in any way, here and below
        raise SystemExit(f"{template.name}: not a valid Jinja template ({error})") from None

    of_requests = json.loads(kwargs)

    def render(messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool = False, **variables) -> str:
        variables = dict(template.special_tokens) | of_requests | variables | {"messages": messages, "tools": tools}
        try:
            return compiled.render(variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            what = error if isinstance(error, jinja2.TemplateError) else repr(error)
            raise TrajectoryError(f"the chat template refuses the messages: {what}") from None

    try:
        split_blocks(render([QUERY], None, add_generation_prompt=True))
    except TrajectoryError as error:
        if of_requests:
            raise
        raise SystemExit(f"{template.name}: {error}") from None
    return render


def fingerprint(render) -> str:
    """8 bytes, as hex, that tell chat templates apart which render reasoning, calls or tools differently."""
    function = {"name": "f", "description": "d", "parameters": {}, "arguments": {"a": "b"}}
    tool = {"type": "function", "function": function}
    turn = {"role": "assistant", "content": "c", "reasoning_content": "r", "tool_calls": [tool]}
    try:
        text = render([QUERY, turn, QUERY, turn, {"role": "tool", "content": "t"}], [tool], True)
    except Exception as error:  # a template may refuse this in any way
        text = type(error).__name__
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_blocks(rendered: str) -> list[tuple[str, str]]:
    """[(role, text)] of a ChatML rendering whose texts hold no marks of ChatML; the generation prompt is left out.

    A token that the whole opens with comes first, as ("", token).
    """
    before, *blocks = rendered.split(BLOCK_START)
    if not blocks or not OPENING.fullmatch(before):
        raise TrajectoryError(NOT_CHATML)
    if blocks[-1].startswith("assistant\n") and BLOCK_END not in blocks[-1]:
        blocks.pop()
    split = [("", before)] if before else []
    for block in blocks:
        role, _, text = block.partition("\n")
        if not text.endswith(BLOCK_END + "\n"):
            raise TrajectoryError(NOT_CHATML)
        split.append((role, text.removesuffix(BLOCK_END + "\n")))
    return split


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which some templates put around assistant text, renders its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)
