"""Step 1: structured trajectories -> plain messages, by the model's own chat template.

    python step1_apply_tool_template.py [INPUT] [OUTPUT] [--chat-template FILE_OR_MODEL]

INPUT   a .json, .jsonl or .parquet file, or a Hugging Face data set id such as XXHStudyHard/EnvScaler-SFT-Traj-9K.
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
import json
import sys
from collections import Counter
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from trajectories import (
    BLOCK_END,
    BLOCK_START,
    FORMATS,
    ROOT,
    SAMPLE,
    Rejects,
    TrajectoryError,
    local_files,
    open_parquet,
    row_writer,
    served_trajectory,
    shown,
    still_there,
    text_parts,
    without_reasoning,
)

QWEN3 = ROOT / "chat_templates" / "qwen3.jinja"
SUFFIX = "_apply_qwen3_template"
QUERY = {"role": "user", "content": "q"}
LEFT_OUT = "turns cannot become samples: the chat template wants a user query before them"
UNSEEN = "turns have reasoning that this chat template does not render; their targets are without it"
PARTS = "messages have several text parts; they are concatenated here, while vLLM puts a newline between them"
NO_QUERY = "the chat template renders this turn without a think block, as no user query comes before it"


# ---------------------------------------------------------------- pure functions


def apply_chat_template(messages: list[dict], tools: list[dict] | None, render, by_chain: bool = True) -> tuple[list, dict]:
    """Plain messages of one trajectory, and the edits that turn them into the served prompt of each turn.

    Args:
        messages, tools: as `served_trajectory` returns them.
        render: see `load_chat_template`.
        by_chain: render one prompt per tool chain instead of one per turn; see `chains_extend`.
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
    blocks = split_blocks(render(messages, tools))
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    places = [j for j, (role, _) in enumerate(blocks) if role == "assistant"]
    if len(places) != len(turns):
        raise TrajectoryError(f"the chat template renders {len(turns)} assistant messages as {len(places)} blocks")

    plain = [{"role": role, "content": text} for role, text in blocks]
    served = {"turns": [], "drop": [], "template": [], "given": _given(render)}
    chains = _chains(messages, turns) if by_chain else [[k] for k in turns]
    query_seen = False
    for k, j in zip(turns, places):
        target = _block_after([QUERY], messages[k], None, render)
        if not (by_chain and query_seen):
            with contextlib.suppress(TrajectoryError):  # some templates refuse messages without a query
                in_place = _block_after(messages[:k], messages[k], tools, render)
                query_seen = in_place == target
                if not query_seen and "reasoning_content" not in messages[k]:
                    target = in_place
        plain[j]["content"] = target
        served["turns"].append({"turn": k, "message": j, "answer": _answer_start(target, messages[k], render),
                                "left_out": None if query_seen else NO_QUERY})  # fmt: skip
    for mode, history in (("drop", without_reasoning(messages)), ("template", messages)):
        contents = [message["content"] for message in plain]
        for chain in chains:
            try:
                prompts = _served_prompts(history, tools, chain, render)
            except TrajectoryError as error:
                for turn in served["turns"]:
                    turn["left_out"] = str(error) if turn["turn"] in chain else turn["left_out"]
                continue
            for k, prompt in zip(chain, prompts):
                if [role for role, _ in prompt] != [message["role"] for message in plain[: len(prompt)]]:
                    raise TrajectoryError(f"the chat template renders other messages before turn {k} than later")
                for j, (_, text) in enumerate(prompt):
                    if text != contents[j]:
                        served[mode].append({"turn": k, "message": j, "content": text})
                        contents[j] = text
    return plain, served


def chains_extend(render) -> bool:
    """Whether, inside a tool chain, each served prompt begins with the one before: then one rendering shows them all.

    It holds for Qwen3 and its relatives. For a template that fails on the probe below, every prefix is rendered.
    """
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    chain = [
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "\n\nb", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "", "reasoning_content": "\nr \n", "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": " c\n", "reasoning_content": "r"},
    ]
    system, query, answer = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, chain[-1]
    response = {"role": "user", "content": "<tool_response>\n4\n</tool_response>"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    probes = [
        ([system, query, *chain, query, *chain, response, answer, answer, query, answer], tools),
        ([query, *chain, *chain, system, *chain, query, query, *chain[2:], query], None),
    ]
    try:
        return all(
            apply_chat_template(messages, tools, render, by_chain=True)
            == apply_chat_template(messages, tools, render, by_chain=False)
            for messages, tools in probes
        )
    except TrajectoryError:
        return False


def split_blocks(rendered: str) -> list[tuple[str, str]]:
    """[(role, text)] of a ChatML rendering whose texts hold no control tokens; an open last block is left out."""
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


def _chains(messages: list[dict], turns: list[int]) -> list[list[int]]:
    """The turns, grouped where nothing but tool outputs comes between one and the next.

    A turn right after another is a chain of its own: templates show the message that closes a prompt in a way of its own.
    """
    chains = []
    for k in turns:
        previous = chains[-1][-1] if chains else k
        only_tools = {message["role"] for message in messages[previous + 1 : k]} == {"tool"}
        if only_tools and (previous == 0 or messages[previous - 1]["role"] != "assistant"):
            chains[-1].append(k)
        else:
            chains.append([k])
    return chains


def _served_prompts(messages: list[dict], tools, chain: list[int], render) -> list[list[tuple[str, str]]]:
    """The blocks of the served prompt of each turn of a chain, from one rendering."""
    blocks = split_blocks(render(messages[: chain[-1]], tools, add_generation_prompt=True))
    return [blocks[: len(blocks) - 2 * later] for later in reversed(range(len(chain)))]  # a turn and its tool outputs each


def _block_after(history: list[dict], message: dict, tools, render) -> str:
    return split_blocks(render([*history, message], tools))[-1][1]


def _given(render, **variables) -> str:
    """What the generation prompt holds of the assistant block."""
    return render([QUERY], None, add_generation_prompt=True, **variables).rpartition(f"{BLOCK_START}assistant\n")[2]


def _answer_start(target: str, message: dict, render) -> int | None:
    """Where the part of a target starts that a model generates with `enable_thinking=False`; None if it has no such."""
    answer = _block_after([QUERY], without_reasoning([message])[0], None, render)
    answer = answer.removeprefix(_given(render, enable_thinking=False))
    return len(target) - len(answer) if target.endswith(answer) else None


# ---------------------------------------------------------------- the chat template


def load_chat_template(name: str):
    """The chat template as a function render(messages, tools, add_generation_prompt=False, **variables) -> str.

    `name` is a `.jinja` file, a local model directory or a Hub model id. The Jinja environment is that of
    `apply_chat_template` in transformers (utils/chat_template_utils.py), without the import of transformers.
    """
    special_tokens = {}
    if name.endswith(".jinja"):
        try:
            template = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise SystemExit(f"{name}: cannot read the chat template ({error.strerror})") from None
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            template, special_tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        except Exception as error:  # transformers raises many kinds; each means that there is no template to be had
            raise SystemExit(f"{name}: no chat template to be had from this model ({error})") from None

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise SystemExit(f"{name}: not a valid Jinja template ({error})") from None

    def render(messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool = False, **variables) -> str:
        try:
            return compiled.render(messages=messages, tools=tools, documents=None,
                                   add_generation_prompt=add_generation_prompt, **special_tokens, **variables)  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TrajectoryError(f"the chat template refuses the messages: {error}") from None

    try:
        split_blocks(render([QUERY], None, add_generation_prompt=True))
    except TrajectoryError as error:
        raise SystemExit(f"{name}: {error}") from None
    return render


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which some templates put around assistant text, renders its body."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(pattern)


# ---------------------------------------------------------------- around them


def convert_row(row: dict, index: int, source: str, apply) -> tuple[dict, Counter]:
    """One input row -> (output row, what the user should know of it, counted); raises TrajectoryError."""
    if "served" in row:
        raise TrajectoryError("the row has a column `served`: it is one of step 1 already")
    messages, tools = served_trajectory(row)
    plain, served = apply(messages, tools)
    notes = Counter(turns=len(served["turns"]))
    for turn in served["turns"]:
        reasoning = messages[turn["turn"]].get("reasoning_content", "").strip()
        notes[LEFT_OUT] += turn["left_out"] is not None
        notes[UNSEEN] += reasoning not in plain[turn["message"]]["content"]
    notes[PARTS] = text_parts(row)
    converted = {**row, "messages": plain, "served": {"source": source, "trajectory": index, **served}}
    try:
        json.dumps(converted, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise TrajectoryError(f"the text holds a lone surrogate, which no tokenizer can read ({error.reason})") from None
    return converted, notes


def default_output(source: str) -> Path:
    path = Path(source)
    if path.suffix in FORMATS:
        return path.with_name(path.stem + SUFFIX + path.suffix)
    return ROOT / "data" / (path.name + SUFFIX + ".jsonl")  # a data set id


def output_schema(files: list[Path], output: Path):
    """Parquet to Parquet, the other columns keep their types; else they are inferred as the rows are written."""
    if output.suffix != ".parquet" or files[0].suffix != ".parquet":
        return None
    import pyarrow as pa

    with open_parquet(files[0]) as file:
        fields = {field.name: field for field in file.schema_arrow}
    return pa.schema([*{**fields, "messages": pa.field("messages", pa.string())}.values(), ("served", pa.string())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", default=shown(SAMPLE), metavar="INPUT")
    parser.add_argument("output", nargs="?", type=Path, metavar="OUTPUT", help=f"default: INPUT's name with {SUFFIX}")
    parser.add_argument("--chat-template", default=str(QWEN3), metavar="FILE_OR_MODEL",
                        help="a .jinja file, a model directory or a Hub model id (default: the embedded Qwen3 template)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of setting it aside")
    args = parser.parse_args()

    output = args.output or default_output(args.input)
    files = local_files(args.input)
    render = load_chat_template(args.chat_template)
    apply = functools.partial(apply_chat_template, render=render, by_chain=chains_extend(render))
    rejects = Rejects(args.input, output, args.strict)
    notes = Counter()
    with row_writer(output, output_schema(files, output)) as write:
        convert = functools.partial(convert_row, source=args.input, apply=apply)
        for row, row_notes in rejects.convert(convert, "step 1"):
            write(row)
            notes.update(row_notes, trajectories=1)
        if not notes:
            rejects.save()
            sys.exit(f"{args.input}: no trajectory is left; {shown(output)} is not written{still_there(output)}")
    rejects.save()
    print(f"{notes['trajectories']} trajectories with {notes['turns']} turns: {shown(output)}")
    for note in (LEFT_OUT, UNSEEN, PARTS):
        if notes[note]:
            print(f"{notes[note]} {note}")
    print(f"next: python step2_to_alpaca_mask_history.py {shown(output)}")


if __name__ == "__main__":
    main()
