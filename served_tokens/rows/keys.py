"""Keys: what a reader takes out of an object is read; what is left over must be known, or the user must name it.

Objects have a level: row, message, call, part (of a content list) or tool. A reader opens an object, which is then a
copy, takes out of it what it reads, and closes it. Nothing is guessed by the words in a key's name.
"""

from collections import Counter
from dataclasses import dataclass, field

from served_tokens.marks import TrajectoryError, in_json, is_empty, kind_of, says

# What --read-as can give another key to: {field: the level of the objects that have it}.
FIELDS = {
    **dict.fromkeys(("messages", "tools", "system"), "row"),
    **dict.fromkeys(("role", "content", "reasoning_content", "tool_calls", "weight"), "message"),
    "arguments": "call",
}
# Keys that say nothing of what the model sees or writes. Where their values hold a message, it is found all the same.
KNOWN = {
    "row": frozenset(
        "id uuid index idx timestamp date created created_at model model_name object system_fingerprint provider "
        "usage cost latency latency_sec duration score reward rewards reward_info source data_source dataset "
        "dataset_source split language category license version generator agent episode episode_id run_id "
        "session_id trace_id instance_id example_id sample_id task task_id domain tags info metadata extra "
        "extra_body trajectory_format resolved exit_status termination_reason name turns num_turns call stream "
        "traj_id trajectory_id conversation_id prompt_id hash repo patch model_patch test_result subset "
        "subset_name question difficulty success pass_rate trial_name result verifier_output model_provider "
        "subcategory title topic environment base_commit problem_statement stop response_format frequency_penalty "
        "presence_penalty min_p user repetition_penalty max_completion_tokens service_tier stream_options "
        "logit_bias done eval_count total_duration temperature top_p top_k max_tokens n seed tool_choice "
        "parallel_tool_calls traj_type task_info user_messages steps".split()
    ),
    "message": frozenset(
        "id uuid index turn_idx timestamp date created created_at model model_name object provider usage cost "
        "latency duration score reward logprobs refusal name tool_call_id tool_name error is_error signature "
        "annotations extra response_metadata usage_metadata metadata ts time message_id sender agent message_type "
        "tool_call_ids step turn_id thought_signatures token_count reasoning_tokens parentUuid".split()
    ),
    "call": frozenset("index signature cache_control caller extra_content call_id status".split()),
    "part": frozenset("id index cache_control citations signature is_error annotations".split()),
    "tool": frozenset(
        "cache_control strict defer_loading annotations title output_schema outputSchema returns examples".split()
    ),
}
REPEATING = ("task_info", "user_messages", "reward_info")  # columns that repeat messages or calls
# Keys of shapes that are not read, and what a row that has them must be brought into: {way out: "level.key …"}.
WAYS_OUT = {
    "it is a system prompt: read it by --read-as {}=system, or put it into messages": "row.instructions "
    "row.system_prompt row.system_message row.system_instruction",
    "convert the row to messages": "row.instruction",
    "it may switch training off: read it by --read-as {}=weight, or write weight: 0 at the turn": "message.loss_weight "
    "message.do_train message.learnable message.is_trained part.weight row.weight row.loss_mask row.train",
    "a turn that goes on is no whole answer: leave it out by weight: 0": "message.prefix message.partial "
    "row.continue_final_message",
    "it is the answer: append it to messages as an assistant message": "row.response row.output row.answer "
    "row.choices row.completion",
    "these are preference rows: write a row for each answer that is to be trained": "row.chosen row.rejected "
    "row.chosen_response row.rejected_response row.chosen_messages row.rejected_messages row.label row.preference",
    "convert the items of the Responses API to messages": "row.input",
    "convert Gemini's contents to messages": "row.contents row.systemInstruction message.parts",
    "convert it to messages, each choice to the message in it": "row.messages_and_choices",
    "convert Bedrock's rows to messages and tools": "row.toolConfig",
    "harmony's channels: convert analysis to reasoning_content, commentary to tool_calls": "message.channel "
    "message.recipient",
    "loss is switched for whole turns only: leave the turn out by weight: 0": "message.train_detail message.loss_spans "
    "message.train_spans",
    "write calls as tool_calls": "message.function_calls message.tool_invocations message.action message.tool_input",
    "the model wrote calls that are no JSON: leave the turn out by weight: 0": "message.invalid_tool_calls",
}
CONVERT = {key: way_out for way_out, keys in WAYS_OUT.items() for key in keys.split()}
CUT = frozenset(
    "length max_tokens max_output_tokens model_length model_context_window_exceeded incomplete content_filter safety "
    "error abort aborted cancelled pause_turn refusal".split()
)
ENDS = ("finish_reason", "stop_reason", "done_reason", "native_finish_reason", "finishReason", "stopReason")
READ_OF_TURNS = frozenset(  # which --ignore-key, said for another message, would take from turns too
    "content reasoning_content reasoning thinking thinking_blocks reasoning_details tool_calls function_call token_ids "
    "prompt_token_ids".split()
)
OF_A_MESSAGE = ("reasoning_content", "thinking_blocks", "reasoning_details", "tool_calls", "function_call")
THOUGHTS = ("reasoning", "thinking")  # also names of switches, which are no texts


@dataclass
class Reader:
    """How the objects of a row are read, and what is met on the way.

    read_as: (key, field) pairs of --read-as.
    ignore_keys: those of --ignore-key, "note" or "message.note". One that is named with its level is as if it were not
        there; one without is never taken from what is read.
    prints_tools_as_sent: whether all keys of a tool are in the prompt, so that none is left over.
    shapes: {name: how often it was met}.
    known: {"message.usage": how often}, left over and harmless or ignored.
    unknown: {"message.note": what to do about it, or nothing where all that is known of it is its name}.
    """

    read_as: tuple = ()
    ignore_keys: tuple = ()
    prints_tools_as_sent: bool = False
    shapes: Counter = field(default_factory=Counter)
    known: Counter = field(default_factory=Counter)
    unknown: dict = field(default_factory=dict)

    def opened(self, value, level: str) -> dict:
        """A copy to take out of, with the keys of --read-as renamed; raises TrajectoryError where it is no object."""
        if not isinstance(value := in_json(value), dict):
            raise TrajectoryError(f"is not an object but {kind_of(value)}")
        left = dict(value)
        for key in self.ignore_keys:
            its_level, named, bare = key.partition(".")
            if named and its_level == level:
                left.pop(bare, None)
        for key, its_field in self.read_as:
            if FIELDS[its_field] == level and key in left:
                there = None if is_empty(in_json(left.get(its_field))) else left[its_field]
                left[its_field] = one_of({its_field: there, key: left.pop(key)}, its_field)
        return left

    def closed(self, left: dict, level: str, turn: dict | None = None, lacks: str | None = None) -> str | None:
        """Note what is left over of an object; returns how it says that its answer was cut off, or None.

        Args:
            turn: what was read of the object, if it is a turn: an API's answer that repeats it is no loss.
            lacks: the field of --read-as that the object has nothing for.
        """
        cut = None
        for key, value in left.items():
            if not says(value):
                continue
            name = f"{level}.{key}"
            repeats = level == "row" and key in REPEATING
            cut_here = None if repeats or level not in ("row", "message") else cut_within(value)
            cut = cut or cut_here
            if cut_here and level == "message":  # the turn is not trained, so it may lack what is there
                self.known[name] += 1
                continue
            holds = None if repeats else held_within(value, turn)
            if name in CONVERT:
                self.unknown[name] = CONVERT[name].format(key)
            elif holds:
                is_column = level == "row" and holds == "tools" and isinstance(in_json(value), list)
                way_out = f"read them by --read-as {key}=tools" if is_column else "bring that into messages and tools"
                self.unknown[name] = f"it holds {holds}: {way_out}"
            elif key in KNOWN[level] or key in self.ignore_keys:
                self.known[name] += 1
            elif level == "message" and key in READ_OF_TURNS:
                self.unknown[name] = "it is read of a turn: take it out of the other messages"
            elif lacks and isinstance(in_json(value), dict if lacks == "arguments" else str) and not turn:
                self.unknown[name] = f"read it by --read-as {key}={lacks}"
            else:
                self.unknown.setdefault(name, "")
        return cut

    def refuse_unknown(self) -> None:
        """Raise TrajectoryError where keys are left over that nobody knows; it names all of them."""
        if not self.unknown:
            return
        by_way_out = {}
        for name, way_out in self.unknown.items():
            by_way_out.setdefault(way_out, []).append(name if name.isprintable() else repr(name))
        nameless = tuple(by_way_out.get("", ()))
        told = [", ".join(names) + (f" ({way_out})" if way_out else "") for way_out, names in by_way_out.items()]
        options = " ".join(f"--ignore-key {name}" for name in nameless)
        ways = f"; read them by --read-as, or leave them out by {options}" if nameless else ""
        raise TrajectoryError(f"nobody reads its keys {', '.join(told)}{ways}", nameless)


def one_of(readings: dict, what: str):
    """The one value that readings of one thing, {where: value}, agree on; None where all are empty."""
    said = {where: value for where, value in readings.items() if not is_empty(value)}
    (first, value), *others = said.items() or [("", None)]
    for other, its_value in others:
        if _stripped(its_value) != _stripped(value):
            raise TrajectoryError(f"{what} stands in both {first} and {other}, and they differ")
    return value


def _stripped(value):
    return value.strip() if isinstance(value, str) else value


def cut_within(value) -> str | None:
    """Why an answer was cut off, by a finish_reason or stop_reason at any depth; None where there is none."""
    value = in_json(value)
    if isinstance(value, list):
        return next(filter(None, map(cut_within, value)), None)
    if not isinstance(value, dict):
        return None
    for key in ENDS:
        if (reason := end_of(value.get(key))) in CUT:
            return reason
    return cut_within(list(value.values()))


def end_of(reason) -> str | None:
    """How an answer ended, as the text in a finish_reason; None where it holds none. SGLang has an object there."""
    reason = reason[-1] if isinstance(reason, list) and reason else reason
    reason = reason.get("type") if isinstance(reason, dict) else reason
    return reason.lower() if isinstance(reason, str) and reason else None


def held_within(value, turn: dict | None) -> str | None:
    """What of a conversation a value holds at any depth: a message, calls or tools; None where there is nothing.

    A message, or reasoning or calls without one, that a turn says as well is not meant.
    """
    value = in_json(value)
    if isinstance(value, list):
        return next(filter(None, (held_within(item, turn) for item in value)), None)
    if not isinstance(value, dict) or not says(value):
        return None
    thinks = turn and any(isinstance(value.get(key), (str, list)) and says(value[key]) for key in THOUGHTS)
    is_message = "role" in value and says(value.get("content"))
    if is_message or thinks or any(says(value.get(key)) for key in OF_A_MESSAGE):
        return None if _repeats(value, turn) else "a message"
    arguments = next((value[key] for key in ("arguments", "args", "input", "params") if says(value.get(key))), None)
    if isinstance(value.get("name"), str) and arguments is not None:
        return None if turn and (value["name"], in_json(arguments)) in _calls(turn) else "a tool call"
    function = value.get("function", value)
    if isinstance(function, dict) and "name" in function and ("parameters" in function or "input_schema" in function):
        return "tools"
    choices = value.get("choices")
    if isinstance(choices, list) and any(isinstance(choice, dict) and says(choice.get("text")) for choice in choices):
        return "an answer"
    return held_within(list(value.values()), turn)


def _repeats(message: dict, turn: dict | None) -> bool:
    """Whether a turn says all that a message says."""
    if not turn:
        return False
    if any(message.get(key) for key in ("thinking_blocks", "reasoning_details", "function_call")):
        return False
    reasoning = next(filter(None, map(message.get, ("reasoning_content", *THOUGHTS))), None)
    same_text = is_empty(message.get("content")) or message["content"] == turn.get("content")
    same_reasoning = is_empty(reasoning) or _stripped(reasoning) == _stripped(turn.get("reasoning_content"))
    calls = _calls(message)
    return same_text and same_reasoning and (is_empty(message.get("tool_calls")) or calls == _calls(turn))


def _calls(message: dict) -> list[tuple]:
    """(name, arguments) of the calls of a message."""
    calls = message.get("tool_calls") if isinstance(message.get("tool_calls"), list) else []
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    functions = [function for function in functions if isinstance(function, dict)]
    return [(function.get("name"), in_json(function.get("arguments"))) for function in functions]


# ---------------------------------------------------------------- thinking

SAYS_ON = frozenset("on true yes enabled enable adaptive auto default minimal low medium high xhigh max".split())
SAYS_OFF = frozenset("off false no none disabled disable".split())
BUDGETS = ("thinking_budget", "budget_tokens", "max_thinking_tokens", "reasoning_budget")
SWITCHES = ("enable_thinking", "think", "thinking", "reasoning", "reasoning_effort", *BUDGETS)
OF_A_SWITCH = ("type", "enabled", "effort", "max_tokens", "summary", "display", "exclude")
PLACES = ("metadata", "extra_body", "chat_template_kwargs")


def thinking_of(left: dict) -> bool | None:
    """What a row says of thinking, under any name that requests have for it; None where it says nothing.

    Takes what it understands out of the row. Raises TrajectoryError where two places differ, or chat_template_kwargs
    holds what step 1 does not pass to the chat template.
    """
    said = {}
    for key in SWITCHES:
        if (switch := _switch(left.get(key), key)) is not None:
            said[key] = switch
            del left[key]
    for place in PLACES:
        inner = in_json(left.get(place))
        if not isinstance(inner, dict):
            continue
        inner = dict(inner)
        for other in () if place != "chat_template_kwargs" else inner.keys() - {*SWITCHES}:
            if inner[other] is not None:
                raise TrajectoryError(f"{place} has {other}, which step 1 does not pass to the chat template")
        if (switch := thinking_of(inner)) is not None:
            said[place] = switch
        left[place] = inner
    if len({*said.values()}) > 1:
        raise TrajectoryError(f"{' and '.join(said)} differ about whether the model is to think")
    return next(iter(said.values()), None)


def _switch(value, key: str) -> bool | None:
    """Whether a switch is on; None where it is no switch, or says nothing."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and key in BUDGETS:
        return value != 0
    if isinstance(value, str) and value.lower() in SAYS_ON | SAYS_OFF:
        return value.lower() in SAYS_ON
    if isinstance(value, dict) and value.keys() <= {*OF_A_SWITCH, *BUDGETS}:
        inner = [_switch(item, "budget_tokens" if its == "max_tokens" else its) for its, item in value.items()]
        said = [switch for switch in inner if switch is not None]
        return False not in said if said else None
    return None
