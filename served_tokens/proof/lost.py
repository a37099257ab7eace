"""Texts of a raw row that are in no sample that should hold them: for rows that are not plain (see `own_reader`).

Walks the JSON of the row and knows nothing of how step 1 reads it. A text of a turn must be in the target of its turn,
a text of any other message in the prompt of the next turn, between the turns that it stands between and behind the
messages before it; tools and a system column before the first turn.
"""

import json
import re
from dataclasses import dataclass

ASSISTANT = "<|im_start|>assistant\n"
CONVERSATIONS = (("messages",), ("conversations",), ("prompt", "completion"))
TOOLS, ARGUMENTS = ("tools", "functions", "tool_defs"), ("arguments", "args", "input", "parameters")
ROLES, TURNS = ("role", "from"), ("assistant", "gpt", "function_call")
# Keys under which no text of a conversation stands.
NOT_SHOWN = frozenset(
    "role from type id uuid index idx turn_idx tool_call_id tool_use_id tool_name timestamp date created created_at "
    "model model_name object system_fingerprint provider usage cost latency latency_sec duration score reward rewards "
    "reward_info source data_source dataset dataset_source split language category license version generator agent "
    "episode episode_id run_id session_id trace_id instance_id example_id sample_id task task_id domain tags info "
    "metadata extra extra_body trajectory_format resolved exit_status termination_reason num_turns call stream "
    "temperature top_p top_k max_tokens n seed tool_choice parallel_tool_calls traj_type task_info user_messages steps "
    "logprobs error is_error refusal signature annotations response_metadata usage_metadata cache_control caller "
    "extra_content citations strict defer_loading finish_reason stop_reason requestor data format "
    "chat_template_kwargs enable_thinking think reasoning_effort message_id message_type parentUuid "
    "reasoning_tokens sender step thought_signatures time token_count tool_call_ids ts turn_id agent call_id "
    "status output_schema outputSchema returns examples title".split()
)
OF_A_ROW = frozenset(  # of columns alone
    "reasoning thinking function_call name turns num_turns traj_id trajectory_id conversation_id prompt_id hash "
    "repo patch model_patch test_result subset subset_name question difficulty success pass_rate trial_name "
    "result verifier_output model_provider subcategory title topic environment base_commit problem_statement stop "
    "response_format frequency_penalty presence_penalty min_p user repetition_penalty max_completion_tokens "
    "service_tier stream_options logit_bias done eval_count total_duration".split()
)
SHOWN = frozenset(  # that a key which is ignored without its level does not take away
    "messages conversations prompt completion tools functions tool_defs system role from content value text "
    "reasoning_content reasoning thinking thinking_blocks reasoning_details tool_calls function_call function name "
    "arguments args input parameters description".split()
)
LEVELS = ("row", "message", "call", "part")
THINK = re.compile("</?think>")  # texts are read apart at these marks
LONG = 3  # characters: of shorter texts little can be said


@dataclass
class Loss:
    """A text that is not where it should be.

    place: of the message or column; key: under which the text stands; where: the target or the prompt that lacks it.
    """

    place: str
    key: str
    text: str
    where: str


def lost_texts(row: dict, shown: dict, turns: int, read_as: dict, ignored: tuple) -> list[Loss] | None:
    """The texts of a row that are lost; None where it has another number of turns than were read.

    Args:
        row: as its file has it.
        shown: {number of a turn: (served prompt, target and what of the turn is not rendered)} of those with a sample.
        turns: how many turns were read.
        read_as: {key: the field that it is read as}; ignored: keys that the user ignores, alone or as "message.note".
    """
    bare = {key for key in ignored if "." not in key} - SHOWN
    of_level = {level: {key.partition(".")[2] for key in ignored if key.startswith(f"{level}.")} for level in LEVELS}
    skipped = NOT_SHOWN | bare | of_level["call"] | of_level["part"]
    not_of_row = NOT_SHOWN | bare | of_level["row"]
    row = {read_as.get(key, key): value for key, value in row.items() if key not in not_of_row}
    columns = next((names for names in CONVERSATIONS if all(row.get(name) for name in names)), ())
    given = [_json(message) for name in columns for message in _json(row[name])]
    not_of_message = bare | of_level["message"] | {"name"}
    messages = [
        {read_as.get(key, key): value for key, value in message.items() if key not in not_of_message}
        for message in given
    ]
    before = _turns_before(messages)
    if before[-1] != turns:
        return None
    lost, done = [], {}  # done: where the messages end that were found behind so many turns
    for position, message in enumerate(messages):
        number, is_turn = before[position], _is_turn(message)
        if message.get("role") == "developer":  # vLLM moves it to the front
            number = 0
        later = min((turn for turn in shown if turn >= number), default=None)
        if is_turn:
            number = before[position + 1] - 1
            where, text, start = "the target of its turn", shown[number][1] if number in shown else None, 0
        else:
            where, start = f"the prompt of turn {later}", done.get(number, 0)
            text = _behind_turns(shown[later][0], number, later) if later is not None else None
        for unit in _units(message) if text is not None else ():
            ends = [(_end(one, text, start), key, one) for key, one in _texts(unit, skipped)]
            lost += [Loss(f"message {position}", key, one, where) for end, key, one in ends if end < 0]
            start = start if is_turn else max([start, *(end for end, _, _ in ends)])
        if not is_turn:
            done[number] = start
    for column in row.keys() - {*columns} - OF_A_ROW if shown else ():
        first = min(shown)
        head = _behind_turns(shown[first][0], 0, first)
        texts = _texts({column: row[column]}, skipped)
        lost += [
            Loss(f"column {column}", column, one, "the first prompt") for _, one in texts if _end(one, head, 0) < 0
        ]
    return lost


def _is_turn(message: dict) -> bool:
    return any(message.get(key) in TURNS for key in ROLES)


def _is_output(message: dict) -> bool:
    """Whether a message holds outputs of tools alone."""
    parts = message.get("content")
    in_blocks = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
    return message.get("role") == "tool" or (in_blocks and all(part.get("type") == "tool_result" for part in parts))


def _units(message: dict) -> list:
    """What stands in order in a message: each part of its content, then the rest of it."""
    if message.get("from") == "function_call" and isinstance(message.get("value"), str):  # calls behind reasoning
        thought, _, calls = message["value"].rpartition("</think>")
        calls = _json(calls.strip())
        return [{"content": thought, "tool_calls": calls if isinstance(calls, list) else [calls]}]
    if not isinstance(message.get("content"), list):
        return [message]
    parts = [{"content": [part]} for part in message["content"]]
    return [*parts, {key: value for key, value in message.items() if key != "content"}]


def _turns_before(messages: list[dict]) -> list[int]:
    """How many turns come before each message, and before the end.

    Messages of one id, with nothing but outputs between them, are parts of one turn, unless others have that id too.
    """
    shared = [None, *(message.get("id") for message in messages if not _is_turn(message))]
    numbers, turns, last = [], 0, None
    for message in messages:
        numbers.append(turns)
        if _is_turn(message):
            turns += message.get("id") in shared or message.get("id") != last
            last = message.get("id")
        elif not _is_output(message):
            last = None
    return [*numbers, turns]


def _behind_turns(prompt: str, number: int, turn: int) -> str:
    """What the prompt of a turn shows between so many turns and the next; all where texts hold marks of their own."""
    parts = prompt.split(ASSISTANT)
    return parts[number] if len(parts) == turn + 2 else prompt


def _texts(value, skipped: frozenset, key: str = "", keys_too: bool = False):
    """Yield (key, text) for each text that is to be looked for; key is the outermost one that it stands under.

    Args:
        keys_too: inside arguments and tools, where keys are texts as well and all are shown.
    """
    if isinstance(value, str):
        pieces = [value] if keys_too else THINK.split(value)
        yield from ((key, piece.strip()) for piece in pieces if len(piece.strip()) >= LONG)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, skipped, key, keys_too)
    elif isinstance(value, dict):
        for name, item in value.items():
            if keys_too:
                yield from _texts(name, skipped, key, True)
            elif name in skipped:
                continue
            if name in TOOLS and not key:
                yield from _of_tools(_json(item), skipped, key or name)
                continue
            if name == "tool_calls" and not key and isinstance(_json(item), list):
                item = [_json(call) for call in _json(item)]
            inside = keys_too or name in ARGUMENTS or (name == "content" and isinstance(item, dict))
            if not (inside and isinstance(item, str) and item.strip() == "null"):
                yield from _texts(_json(item) if inside else item, skipped, key or name, inside)


def _of_tools(tools, skipped: frozenset, key: str):
    """The same of tools: their names, descriptions, and all texts and keys of their schemas."""
    tools = list(tools.values()) if isinstance(tools, dict) else tools
    for tool in map(_json, tools if isinstance(tools, list) else ()):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        function = function if isinstance(function, dict) else {}
        yield from _texts([function.get("name"), function.get("description")], skipped, key)
        for schema in ("parameters", "input_schema", "inputSchema"):
            yield from _texts(_json(function.get(schema)), skipped, key, True)


def _end(text: str, shown: str, start: int) -> int:
    """Where a text ends that is shown from `start` on, as it is, within JSON, or printed anew; -1 where it is not."""
    found = [(shown.find(form, start), len(form)) for form in _forms(text)]
    if found := [place + length for place, length in found if place >= 0]:
        return min(found)
    value = _json(text)
    if value is text:
        return -1
    ends = [_end(part, shown, start) for _, part in _texts(value, frozenset(), keys_too=True)]
    return -1 if -1 in ends else max(ends, default=start)


def _forms(text: str) -> dict:
    """A text as it is, and as JSON within one or two levels of strings."""
    once = [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    return dict.fromkeys([text, *once, *(json.dumps(one)[1:-1] for one in once)])


def _json(value):
    """A list or object, also out of a JSON string; any other value as it is."""
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
