"""Step 1: structured trajectories -> plain messages, by the model's own chat template.

    python step1_apply_tool_template.py [INPUT] [OUTPUT] [--chat-template FILE_OR_MODEL]

INPUT   a .json, .jsonl or .parquet file, or a Hugging Face data set id such as XXHStudyHard/EnvScaler-SFT-Traj-9K, also with
        a revision (ID@REVISION). Of a data set only the files that hold trajectories are downloaded.
        Row: {"messages": [{"role": "user", "content": "…"},
                           {"role": "assistant", "reasoning_content": "…", "content": "…", "tool_calls": […]},
                           {"role": "tool", "content": "…"}, …],
              "tools": […] or null, any other columns}
OUTPUT  the same row with
        "messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …]   (the blocks of the rendering)
        "served":   what each turn's prompt looks like when the model is served (see `apply_chat_template`)

The one idea: every assistant message becomes its target, the text that the model generates at that turn, reasoning
included. How that message looks later, as history in the prompts of other turns, is kept beside it as edits.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.sandbox
import orjson

from served_tokens import hub_data_set
from trajectories import (
    BLOCK_END,
    BLOCK_START,
    CONTROL_TOKENS,
    FORMATS,
    ROOT,
    SAMPLE,
    Place,
    Rejects,
    SharedTool,
    TrajectoryError,
    check_output,
    decoded_messages,
    exit_on_sigterm,
    first_columns,
    is_text_parts,
    json_row,
    local_file,
    map_texts,
    open_parquet,
    positive_count,
    row_writer,
    served_trajectory,
    shown,
    still_there,
    time_limit,
    with_stand_ins,
    without_reasoning,
)

QWEN3 = ROOT / "chat_templates" / "qwen3.jinja"
SUFFIX = "_apply_qwen3_template"
QUERY, OUTPUT = {"role": "user", "content": "q"}, {"role": "tool", "content": "t"}
TURN = {"role": "assistant", "content": "a", "reasoning_content": "r"}
OURS = ("messages", "served")
LEFT_OUT = "turns cannot become samples: the chat template wants a user query before them"
UNSEEN = "turns have reasoning that this chat template does not render; their targets are without it"
PARTS = "messages have several text parts; they are concatenated here, while vLLM puts a newline between them"
SERIALIZED = "tool outputs are objects or lists; they are rendered as JSON, as clients send them"
NO_QUERIES = "user messages are one <tool_response> block, which Qwen3's template does not take for a query"
UNKNOWN_TOOL = "tool calls name a tool that their trajectory does not offer"
BAD_ARGUMENTS = "tool calls have arguments that break the JSON schema of their tool"
BAD_SCHEMA = "tool calls could not be validated: the schema of their tool is broken, or takes too long"
NO_OUTPUT = "tool calls are followed by another message than their output"
NO_CALL = "tool outputs follow no tool call"
UNKNOWN_ID = "tool outputs have a tool_call_id that no call before them has"
NOTES = (LEFT_OUT, UNSEEN, PARTS, SERIALIZED, NO_QUERIES, UNKNOWN_TOOL, BAD_ARGUMENTS, BAD_SCHEMA, NO_OUTPUT, NO_CALL, UNKNOWN_ID)
RENDER_CHARACTERS = 1 << 29  # the most that a chat template may write for one trajectory
LONG = 3000  # characters of a text that a template might shorten
NO_QUERY = "the chat template renders this turn without a think block, as no user query comes before it"


# ---------------------------------------------------------------- pure functions


def apply_chat_template(messages: list[dict], tools: list[dict] | None, render, linear: bool = True) -> tuple[list, dict]:
    """Plain messages of one trajectory, and the edits that turn them into the served prompt of each turn.

    Args:
        messages, tools: as `served_trajectory` returns them, without control tokens.
        render: see `load_chat_template`.
        linear: the template is one for which `renders_by_query` holds, so that an ordinary trajectory need not be
            rendered once for every turn. The result is the same.
    Returns (plain, served):
        plain: [{"role", "content"}], one per block of the rendering; an assistant message holds its target.
        served: {"turns": [{"turn": k, "message": j, "answer": a, "left_out": reason or None}],
                 "drop": [{"turn": k, "message": j, "content": text}], "template": […], "given": text}
            A turn is messages[k] and plain[j]. Its target without the think block is plain[j]["content"][a:].
            Its served prompt is plain[:j], in which for each edit with a turn <= k, in order, the message reads
            `content` instead. `drop` and `template` are the two histories (README, "Which history"). `given` is
            the part of each target that the generation prompt holds already (nothing, or `<think>` and a newline).
    Raises TrajectoryError where the template refuses the messages, or does not render ChatML.
    """
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    rendered = _rendered_by_query(messages, tools, turns, render) if linear else None
    blocks, targets, answers, left_out, edits = rendered or _rendered_by_prefix(messages, tools, turns, render)
    plain = [{"role": role, "content": text} for role, text in blocks]
    served = {"turns": [], **edits, "given": _given(render)}
    for k, j, target, answer, reason in zip(turns, _places(blocks, turns), targets, answers, left_out):
        plain[j]["content"] = target
        start = len(target) - len(answer) if target.endswith(answer) else None
        served["turns"].append({"turn": k, "message": j, "answer": start, "left_out": reason})
    return plain, served


def apply_despite_control_tokens(messages: list[dict], tools: list[dict] | None, render, linear: bool = True) -> tuple:
    """`apply_chat_template` for texts that may hold control tokens, at which its renderings could not be split."""
    hidden, hidden_tools, reveal = with_stand_ins(messages, tools)
    if not reveal:
        return apply_chat_template(messages, tools, render, linear)
    if reveal(render(hidden, hidden_tools)) != render(messages, tools):
        raise TrajectoryError("the chat template alters texts with control tokens, so its rendering cannot be split")
    plain, served = apply_chat_template(hidden, hidden_tools, render, linear)
    return map_texts(plain, reveal), map_texts(served, reveal)


def _places(blocks: list[tuple], turns: list[int]) -> list[int]:
    """Which blocks of the rendering are the turns."""
    places = [j for j, (role, _) in enumerate(blocks) if role == "assistant"]
    if len(places) != len(turns):
        raise TrajectoryError(f"the chat template renders {len(turns)} assistant messages as {len(places)} blocks")
    return places


def _rendered_by_prefix(messages: list[dict], tools, turns: list[int], render):
    """The naive definition: every prefix rendered.

    Returns (blocks of the whole, targets, their part without a think block, reasons to leave turns out, the edits of
    both histories).
    """
    blocks, targets, left_out, prompts = split_blocks(render(messages, tools)), [], [], {"drop": [], "template": []}
    histories = {"drop": without_reasoning(messages), "template": messages}
    for k in turns:
        target, reason = _last_block([QUERY, messages[k]], None, render), NO_QUERY
        with contextlib.suppress(TrajectoryError):  # some templates refuse messages without a query
            in_place = _last_block(messages[: k + 1], tools, render)
            if in_place == target:
                reason = None
            elif "reasoning_content" not in messages[k]:
                target = in_place
        for mode, history in histories.items():
            try:
                prompts[mode].append(split_blocks(render(history[:k], tools, add_generation_prompt=True)))
            except TrajectoryError as error:
                prompts[mode].append([])
                reason = str(error)
        targets.append(target)
        left_out.append(reason)
    places = _places(blocks, turns)
    edits = {mode: _edits(blocks, dict(zip(places, targets)), turns, prompts[mode]) for mode in prompts}
    return blocks, targets, [_answer(messages[k], render) for k in turns], left_out, edits


def _edits(blocks: list[tuple], targets: dict, turns: list[int], prompts: list[list]) -> list[dict]:
    """What changes from the served prompt of one turn to that of the next."""
    edits, contents = [], [targets.get(j, text) for j, (_, text) in enumerate(blocks)]
    for k, prompt in zip(turns, prompts):
        if [role for role, _ in prompt] != [role for role, _ in blocks[: len(prompt)]]:
            raise TrajectoryError(f"the chat template renders other messages before turn {k} than later")
        for j, (_, text) in enumerate(prompt):
            if text != contents[j]:
                edits.append({"turn": k, "message": j, "content": text})
                contents[j] = text
    return edits


def _rendered_by_query(messages: list[dict], tools, turns: list[int], render):
    """The same, each message rendered a fixed number of times; None for a trajectory that is not ordinary.

    In an ordinary one a user query comes first, no turn follows right on another and no answer holds a think tag. Then a
    turn has two looks: `past` once a query came after it, as if it had no reasoning, and `kept` before that. One
    rendering, up to the last turn, shows the turns before the last query as past and those after it as kept; a second
    one, of the turns alone, shows each the other way.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    odd = any(messages[k - 1]["role"] == "assistant" or "</think>" in messages[k]["content"] for k in turns)
    if odd or first not in (queries := _queries(messages, render)):
        return None
    starts = [0]  # where the blocks of a message start, from messages[first] on; the outputs of a turn share one
    for before, message in zip(messages[first:], messages[first + 1 :]):
        starts.append(starts[-1] + (not before["role"] == message["role"] == "tool"))
    last = max(query for query in queries if query < turns[-1])
    early, late = [k for k in turns if k < last], [k for k in turns if k > last]
    try:
        blocks = split_blocks(render(messages[: turns[-1] + 1], tools))
        late_past = without_reasoning([messages[k] for k in late])
        other = split_blocks(render([*messages[:first], QUERY, *late_past, QUERY, *(messages[k] for k in early), OUTPUT], None))
        opening = len(blocks) - 1 - starts[turns[-1] - first]
        places = [opening + starts[k - first] for k in turns]
        alone = _last_block([QUERY, messages[turns[-1]]], None, render)
        if places != _places(blocks, turns) or blocks[-1][1] != alone:  # a template may look at more than expected
            return None
        here, there = [blocks[j][1] for j in places], [text for role, text in other if role == "assistant"]
        past, kept = here[: len(early)] + there[: len(late)], there[len(late) :] + here[len(early) :]
        targets = [
            text if k == turns[-1] or messages[k].get("reasoning_content", "").strip() else _last_block([QUERY, messages[k]], None, render)
            for k, text in zip(turns, kept)
        ]
        answers = [text if text[:1].strip() else _answer(messages[k], render) for k, text in zip(turns, past)]
        if turns[-1] + 1 < len(messages):
            blocks += split_blocks(render(messages, tools))[len(blocks) :]
    except TrajectoryError:
        return None
    edits, shown, since_query = {"drop": [], "template": []}, targets[:], 0
    for i, (before, k) in enumerate(zip(turns, turns[1:])):
        edits["drop"] += [{"turn": k, "message": places[i], "content": past[i]}] * (past[i] != targets[i])
        new_query = any(before < query < k for query in queries)
        for j in range(since_query if new_query else i, i + 1):
            text = past[j] if new_query else kept[j]
            edits["template"] += [{"turn": k, "message": places[j], "content": text}] * (text != shown[j])
            shown[j] = text
        since_query = i + 1 if new_query else since_query
    return blocks, targets, answers, [None] * len(turns), edits


def _queries(messages: list[dict], render) -> list[int]:
    """The user messages after which the template shows earlier turns differently; the first if it is like any query."""
    places = [k for k, message in enumerate(messages) if message["role"] == "user"]
    try:
        kept, target = _shown_turn(render)
        queries = [k for k in places[1:] if not render([QUERY, TURN, messages[k]], None).startswith(kept)]
        opens = render([*(messages[k] for k in places[:1]), TURN], None).endswith(target)
    except TrajectoryError:
        return []
    return places[:1] * opens + queries


@functools.cache
def _shown_turn(render) -> tuple[str, str]:
    """(how a rendering begins where a turn is before a tool output, how it ends where the turn is the last)"""
    before, _, _ = render([QUERY, TURN, OUTPUT], None).rpartition(BLOCK_START)
    _, opened, target = render([QUERY, TURN], None).rpartition(BLOCK_START)
    return before + BLOCK_START, opened + target


def renders_by_query(render) -> bool:
    """Whether rendering by query gives what the naive definition gives, on a conversation with all that templates look at.

    It does for Qwen3 and most of its relatives. For a template that fails here, every prefix is rendered.
    """
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    chain = [
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [call]},
        {"role": "tool", "content": "1" * LONG},
        {"role": "assistant", "content": "\n\nb", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "", "reasoning_content": "\nr \n", "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": " c\n", "reasoning_content": "r"},
    ]
    system, response = {"role": "system", "content": "s"}, {"role": "user", "content": "<tool_response>\n4\n</tool_response>"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    probes = [
        ([system, QUERY, *chain, QUERY, *chain, response, *chain, system, *chain[2:], QUERY, QUERY, chain[-1]], tools),
        ([QUERY, *chain[-1:], QUERY, *chain, QUERY], None),
        ([QUERY, *chain[:2], QUERY, {**chain[-1], "reasoning_content": "\n", "content": "c" * LONG}, QUERY, *chain[:2]], tools),
    ]
    try:
        return all(
            apply_chat_template(*probe, render, linear=True) == apply_chat_template(*probe, render, linear=False)
            for probe in probes
        )
    except TrajectoryError:
        return False


def unusual(as_given: list, messages: list[dict], tools: list[dict] | None) -> Counter:
    """What is served as it is and may still be a mistake in the data: {note: how many}.

    Args:
        as_given: the messages of the row.
        messages, tools: the same as `served_trajectory` returns them.
    """
    notes, known = Counter(), [tool_function(tool).get("name") for tool in tools or []]
    ids, waiting = set(), 0  # of the calls so far; calls whose output is still to come
    for given, message in zip(as_given, messages):
        role, content = message["role"], given.get("content")
        if isinstance(content, (list, dict)):
            parts = is_text_parts(content)
            notes[PARTS if parts else SERIALIZED] += not parts or len(content) > 1
        if role == "user" and message["content"].startswith("<tool_response>"):
            notes[NO_QUERIES] += message["content"].endswith("</tool_response>")
        if role == "tool":
            notes[NO_CALL] += not waiting
            identity = message.get("tool_call_id")
            notes[UNKNOWN_ID] += bool(ids) and isinstance(identity, str) and identity not in ids
            waiting = max(0, waiting - 1)
            continue
        notes[NO_OUTPUT] += waiting
        calls = message.get("tool_calls", [])
        waiting = len(calls)
        for call in calls:
            notes[UNKNOWN_TOOL] += bool(known) and tool_function(call)["name"] not in known
            if isinstance(call.get("id"), str):
                ids.add(call["id"])
    return notes


def schema_breaks(messages: list[dict], tools: list[dict] | None) -> Counter:
    """How many tool calls break the JSON schema of their tool: {note: how many}."""
    notes, schemas = Counter(), {}
    for function in map(tool_function, tools or []):
        if isinstance(function.get("name"), str):
            schemas[function["name"]] = function.get("parameters")
    for call in (tool_function(call) for message in messages for call in message.get("tool_calls", [])):
        schema = schemas.get(call["name"])
        try:
            with time_limit():  # a pattern may take for ever
                notes[BAD_ARGUMENTS] += schema is not None and not _validator(json.dumps(schema)).is_valid(call["arguments"])
        except Exception:  # a broken schema raises many kinds; what it says of the arguments is not known
            notes[BAD_SCHEMA] += 1
    return notes


@functools.lru_cache(maxsize=1024)  # many trajectories share their tools
def _validator(schema: str):
    import jsonschema
    import referencing

    schema = json.loads(schema)
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=referencing.Registry())  # an empty one: without it, a $ref would be fetched from anywhere


def tool_function(tool: dict) -> dict:
    """What a tool or a tool call says of its function, wrapped or not."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


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


def _last_block(messages: list[dict], tools, render) -> str:
    return split_blocks(render(messages, tools))[-1][1]


def _answer(message: dict, render) -> str:
    """What the model generates in place of a message with `enable_thinking=False`."""
    whole = _last_block([QUERY, *without_reasoning([message])], None, render)
    return whole.removeprefix(_given(render, enable_thinking=False))


@functools.cache
def _given(render, **variables) -> str:
    """What the generation prompt holds of the assistant block."""
    return render([QUERY], None, add_generation_prompt=True, **variables).rpartition(f"{BLOCK_START}assistant\n")[2]


# ---------------------------------------------------------------- the chat template


def load_chat_template(name: str):
    """The chat template as a function render(messages, tools, add_generation_prompt=False, **variables) -> str.

    `name` is a `.jinja` file, a local model directory or a Hub model id.
    """
    return _compiled(read_chat_template(name))


def read_chat_template(name: str) -> str:
    """What `prepared_template` needs of a chat template, on whatever machine: JSON of
    [name, text, special tokens, what no text of a trajectory may hold].

    That is Qwen's control tokens, and where the chat template comes with a tokenizer, all of its own.
    """
    if name.endswith(".jinja"):
        try:
            return json.dumps([name, Path(name).read_text(encoding="utf-8"), {}, CONTROL_TOKENS])
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
    return json.dumps([name, template, tokenizer.special_tokens_map, [*control_tokens]])


def _compiled(chat_template: str):
    """The Jinja environment is that of transformers (utils/chat_template_utils.py), without the import of transformers."""
    name, template, special_tokens, _ = json.loads(chat_template)
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        with time_limit():
            compiled = environment.from_string(template)
        compiled.globals = dict(compiled.globals)  # Jinja's chain of two is copied for every rendering, slowly
    except Exception as error:  # a template may fail in any way, here and below
        raise SystemExit(f"{name}: not a valid Jinja template ({error})") from None

    def render(messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool = False, **variables) -> str:
        variables |= dict(messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt)
        try:
            with time_limit():
                return _bounded(compiled.generate(**special_tokens, **variables))
        except Exception as error:
            what = str(error) if isinstance(error, (jinja2.TemplateError, ValueError)) else f"{type(error).__name__}: {error}"
            raise TrajectoryError(f"the chat template refuses the messages: {what}") from None

    try:
        split_blocks(render([QUERY], None, add_generation_prompt=True))
    except TrajectoryError as error:
        raise SystemExit(f"{name}: {error}") from None
    return render


def _bounded(chunks) -> str:
    """The text of a rendering, up to RENDER_CHARACTERS."""
    texts, length = [], 0
    while some := list(itertools.islice(chunks, 64)):
        texts.append("".join(some))
        length += len(texts[-1])
        if length > RENDER_CHARACTERS:
            raise TrajectoryError(f"it renders more than {RENDER_CHARACTERS} characters")
    return "".join(texts)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Jinja's, but that a key of a dict and what `loop` knows are looked up in place, without a call."""

    def visit_Getattr(self, node, frame):
        of, key, found = (node.node, frame), repr(node.attr), isinstance(node.node, jinja2.nodes.Name)
        if found and node.node.name == "loop" and node.attr in _LOOP_ATTRIBUTES:
            parts = "(", of, f".{node.attr} if type(", of, ") is LoopContext else "
        elif found and node.attr not in _DICT_ATTRIBUTES:
            parts = "(", of, f"[{key}] if type(", of, f") is dict and {key} in ", of, " else "
        else:
            super().visit_Getattr(node, frame)
            return
        for part in parts:
            self.write(part) if isinstance(part, str) else self.visit(*part)
        super().visit_Getattr(node, frame)
        self.write(")")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with short cuts to what it would find in the end, for the types that templates look at most."""

    code_generator_class = _CodeGenerator

    def getattr(self, obj, attribute):
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind in _PLAIN and not attribute.startswith(("_", "format")):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                pass
        return super().getattr(obj, attribute)

    def call(self, context, obj, /, *args, **kwargs):
        if type(obj) is types.BuiltinMethodType and type(obj.__self__) is str:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return obj(*args, **kwargs)
        return super().call(context, obj, *args, **kwargs)


_DICT_ATTRIBUTES = frozenset(dir(dict))
_LOOP_ATTRIBUTES = frozenset(name for name in dir(jinja2.runtime.LoopContext) if not name.startswith("_"))
_PLAIN = (str, jinja2.runtime.LoopContext, jinja2.utils.Namespace)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which some templates put around assistant text, renders its body."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    if not (ensure_ascii or sort_keys) and indent is None and separators is None:
        return value._as_json if type(value) is SharedTool else _encode(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every call


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(pattern)


# ---------------------------------------------------------------- around them


def convert_row(
    row: dict,
    place: Place,
    chat_template: str,
    as_json: bool,
    allow_control_tokens: bool = False,
    validate_tools: bool = False,
) -> tuple[dict | bytes, Counter]:
    """One input row -> (output row or its JSON, what the user should know of it, counted); raises TrajectoryError."""
    if "served" in row:
        raise TrajectoryError("the row has a column `served`: it is one of step 1 already")
    as_given = decoded_messages(row)
    render, linear, refused = prepared_template(chat_template)
    messages, tools = served_trajectory({**row, "messages": as_given}, () if allow_control_tokens else refused)
    notes = unusual(as_given, messages, tools)
    if validate_tools:
        notes += schema_breaks(messages, tools)
        for note in (UNKNOWN_TOOL, BAD_ARGUMENTS, BAD_SCHEMA):
            if notes[note]:
                raise TrajectoryError(f"{notes[note]} {note}; fix them, or drop --validate-tools")
    apply = apply_despite_control_tokens if allow_control_tokens else apply_chat_template
    plain, served = apply(messages, tools, render, linear)
    notes += Counter(trajectories=1, turns=len(served["turns"]))
    for turn in served["turns"]:
        reasoning = messages[turn["turn"]].get("reasoning_content", "").strip()
        notes[LEFT_OUT] += turn["left_out"] is not None
        notes[UNSEEN] += reasoning not in plain[turn["message"]]["content"]
    converted = {**row, "messages": plain, "served": {"source": place.source, "trajectory": place.row, **served}}
    try:
        if as_json:
            return json_row(converted, OURS), notes
        json.dumps(row, ensure_ascii=False, default=str).encode()
        return {**converted, **{column: orjson.dumps(converted[column]).decode() for column in OURS}}, notes
    except (UnicodeEncodeError, orjson.JSONEncodeError):
        raise TrajectoryError("the text holds a lone surrogate, which no tokenizer can read") from None


@functools.cache
def prepared_template(chat_template: str) -> tuple:
    """(render, whether it renders by query, control tokens) of what `read_chat_template` returns, made once in each process."""
    *_, control_tokens = json.loads(chat_template)
    render = _compiled(chat_template)
    return render, renders_by_query(render), tuple(control_tokens)


def is_on_hub(source: str) -> bool:
    """Whether INPUT is the id of a data set, and not a file."""
    return hub_data_set.is_data_set(source) and Path(source).suffix not in FORMATS and not Path(source).exists()


def default_output(source: str) -> Path:
    if is_on_hub(source):
        return ROOT / "data" / (hub_data_set.name_of(source) + SUFFIX + ".jsonl")
    path = Path(source)
    return path.with_name(path.stem + SUFFIX + path.suffix)


def find_files(source: str, pattern: str | None, split: str | None) -> list[str]:
    """The files behind INPUT: itself, or the addresses of those that hold trajectories in a data set of the Hub."""
    if is_on_hub(source):
        return hub_data_set.download_trajectories(source, pattern, split, dict.fromkeys(FORMATS, first_columns))
    if pattern or split:
        raise SystemExit(f"{source}: is no Hugging Face data set id; --file and --split choose among the files of one")
    local_file(source)
    return [source]


def output_schema(source: str, output: Path):
    """Parquet to Parquet, the other columns keep their types; else they are inferred as the rows are written."""
    path = local_file(source)
    if output.suffix != ".parquet" or path.suffix != ".parquet":
        return None
    import pyarrow as pa

    with open_parquet(path, path) as file:
        fields = {field.name: field for field in file.schema_arrow}
    return pa.schema([*{**fields, "messages": pa.field("messages", pa.string())}.values(), ("served", pa.string())])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat-template", default=str(QWEN3), metavar="FILE_OR_MODEL",
                        help="a .jinja file, a model directory or a Hub model id (default: the embedded Qwen3 template)")  # fmt: skip
    parser.add_argument("--allow-control-tokens", action="store_true",
                        help="keep trajectories whose texts hold control tokens such as <|im_start|>, which the model reads as "
                             "such when it is served and trained (default: set them aside)")  # fmt: skip
    parser.add_argument("--validate-tools", action="store_true",
                        help="set trajectories aside whose tool calls name an unknown tool or break its JSON schema")  # fmt: skip


def print_notes(notes: Counter) -> None:
    for note in NOTES:
        if notes[note]:
            print(f"{notes[note]} {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", default=shown(SAMPLE), metavar="INPUT")
    parser.add_argument("output", nargs="?", type=Path, metavar="OUTPUT", help=f"default: INPUT's name with {SUFFIX}")
    parser.add_argument("--file", metavar="NAME", help="of a data set, read this file only, or those that this glob matches")
    parser.add_argument("--split", metavar="NAME", help="of a data set, read the files of this split only")
    add_options(parser)
    parser.add_argument("--num-proc", type=positive_count, default=os.cpu_count(), metavar="N",
                        help="processes (default: one per core)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of setting it aside")
    args = parser.parse_intermixed_args()

    exit_on_sigterm()
    output = args.output or default_output(args.input)
    if args.output:
        check_output(output)
    chat_template = read_chat_template(args.chat_template)
    prepared_template(chat_template)  # before the work, so that a bad one costs nothing
    files = find_files(args.input, args.file, args.split)
    notes = Counter()
    convert = functools.partial(
        convert_row, chat_template=chat_template, as_json=output.suffix != ".parquet",
        allow_control_tokens=args.allow_control_tokens, validate_tools=args.validate_tools,
    )  # fmt: skip
    with Rejects(files, output, args.strict) as rejects, row_writer(output, output_schema(files[0], output)) as write:
        for row, row_notes in rejects.convert(convert, "step 1", args.num_proc):
            write(row)
            notes.update(row_notes)
        rejects.save()
        if not notes:
            sys.exit(f"{args.input}: no trajectory is left; {shown(output)} is not written{still_there(output)}")
    print(f"{rejects.rows_in} rows in = {notes['trajectories']} rows out + {rejects.set_aside} set aside: {shown(output)}")
    print(f"{notes['turns']} turns in = {notes['turns'] - notes[LEFT_OUT]} turns for samples + {notes[LEFT_OUT]} left out")
    print_notes(notes)
    print(f"next: python step2_to_alpaca_mask_history.py {shown(output)}")


if __name__ == "__main__":
    main()
