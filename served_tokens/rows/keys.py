"""Keys: what a reader takes out of an object is read; what is left over must be known, or the user must name it.

Objects have a level: row, message, call, part (of a content list) or tool. A reader opens an object, which is then a
copy, takes out of it what it reads, and closes it. Nothing is guessed by the words in a key's name.
"""

from collections import Counter
from dataclasses import dataclass, field

from served_tokens.marks import TrajectoryError, in_json, kind_of, says
from served_tokens.rows.servers import Style

# What --read-as can give another key to: {field: the level of the objects that have it}.
FIELDS = {
    **dict.fromkeys(("messages", "tools", "system"), "row"),
    **dict.fromkeys(("role", "content", "reasoning_content", "tool_calls", "weight"), "message"),
    "arguments": "call",
}
OF_ARGUMENTS = [(key, "arguments") for key in ("args", "input", "parameters")]  # other names of them in a call
# Keys that say nothing of what the model sees or writes. Where their values hold a message, it is found all the same.
KNOWN_WORDS = {
    "row": "id uuid index idx timestamp date created created_at model model_name object system_fingerprint provider "
    "usage cost latency latency_sec duration score reward rewards reward_info source data_source dataset "
    "dataset_source split language category license version generator agent episode episode_id run_id "
    "session_id trace_id instance_id example_id sample_id task task_id domain tags info metadata extra "
    "extra_body trajectory_format resolved exit_status termination_reason name turns num_turns call stream "
    "traj_id trajectory_id conversation_id prompt_id hash repo patch model_patch test_result subset "
    "subset_name question difficulty success pass_rate trial_name result verifier_output model_provider "
    "subcategory title topic environment base_commit problem_statement stop response_format frequency_penalty "
    "presence_penalty min_p user repetition_penalty max_completion_tokens service_tier stream_options "
    "logit_bias done eval_count total_duration temperature top_p top_k max_tokens n seed tool_choice "
    "parallel_tool_calls traj_type task_info user_messages steps",
    "message": "id uuid index turn_idx timestamp date created created_at model model_name object provider usage cost "
    "latency duration score reward logprobs refusal name tool_call_id tool_name error is_error signature "
    "annotations extra response_metadata usage_metadata metadata ts time message_id sender agent message_type "
    "tool_call_ids step turn_id thought_signatures token_count reasoning_tokens parentUuid",
    "call": "index signature cache_control caller extra_content call_id status requestor",
    "part": "id index cache_control citations signature is_error annotations",
    "tool": "cache_control strict annotations title output_schema outputSchema returns examples",
}
KNOWN = {level: frozenset(words.split()) for level, words in KNOWN_WORDS.items()}
REPEATING = ("row.task_info", "row.user_messages", "row.reward_info")  # they repeat messages or calls
# Keys of shapes that are not read, and what a row that has them must be brought into: {way out: "level.key …"}.
WAYS_OUT = {
    "it is a system prompt: read it by --read-as {}=system, or put it into messages": "row.instructions "
    "row.system_prompt row.system_message row.system_instruction",
    "it may switch training off: read it by --read-as {}=weight, or write weight: 0 at the turn": "message.loss_weight "
    "message.do_train message.learnable message.is_trained part.weight row.weight row.loss_mask row.train",
    "it is the answer: append it to messages as an assistant message": "row.response row.output row.answer "
    "row.choices row.completion",
    "these are preference rows: write a row for each answer that is to be trained": "row.chosen row.rejected "
    "row.chosen_response row.rejected_response row.chosen_messages row.rejected_messages row.label row.preference",
    "convert the items of the Responses API to messages": "row.input",
    "convert Gemini's contents to messages": "row.contents row.systemInstruction message.parts",
    "convert it to messages, each choice to the message in it": "row.messages_and_choices",
    "harmony's channels: convert analysis to reasoning_content, commentary to tool_calls": "message.channel "
    "message.recipient",
    "loss is switched for whole turns only: leave the turn out by weight: 0": "message.train_detail message.loss_spans "
    "message.train_spans",
    "write calls as tool_calls": "message.function_calls message.tool_invocations",
    "the model wrote calls that are no JSON: leave the turn out by weight: 0": "message.invalid_tool_calls",
}
CONVERT = {key: way_out for way_out, keys in WAYS_OUT.items() for key in keys.split()}
# How an answer ended, as APIs say it.
ENDS = ("finish_reason", "stop_reason", "done_reason", "native_finish_reason", "finishReason", "stopReason")
FINISHED = frozenset(
    "stop tool_calls tool_call tool-calls function_call end_turn tool_use stop_sequence eos eos_token stop_token end "
    "complete completed".split()
)
CUT = frozenset(
    "length max_tokens max_output_tokens model_length model_context_window_exceeded incomplete content_filter safety "
    "error abort aborted cancelled pause_turn refusal".split()
)
REASONING = ("reasoning_content", "reasoning", "thinking")  # the last two are names of switches too
OF_A_MESSAGE = ("reasoning_content", "thinking_blocks", "reasoning_details", "tool_calls", "function_call")
ARGUMENTS = ("arguments", "args", "input", "params")
RECORDED = ("prompt_token_ids", "token_ids")  # what a server was given and what the model wrote, as vLLM returns them


@dataclass
class Reader:
    """How the objects of a row are read, and what is met on the way.

    Of ignore_keys, one with its level ("message.note") is as if it were not there; one without ("note") is never taken
    from what is read.
    """

    read_as: list  # (key, field) pairs of --read-as
    ignore_keys: list  # those of --ignore-key
    style: Style  # where it prints all keys of a tool, none is left over
    shapes: Counter = field(default_factory=Counter)  # {name: how often it was met}
    known: Counter = field(default_factory=Counter)  # {"message.usage": how often}, left over and harmless or ignored
    unknown: dict = field(default_factory=dict)  # {"message.note": what to do about it, or "" for a name alone}

    def opened(self, value, level: str) -> dict:
        """A copy to take out of, its other names renamed; raises TrajectoryError where it is no object."""
        if not isinstance(value := in_json(value), dict):
            raise TrajectoryError(f"a {level} is not an object but {kind_of(value)}")
        left = dict(value)
        for name in self.ignore_keys:
            its_level, _, key = name.partition(".")
            if its_level == level:
                left.pop(key, None)
        for key, its_field in [*self.read_as, *OF_ARGUMENTS]:
            if FIELDS[its_field] == level:
                rename(left, key, its_field)
        return left

    def read(self, value, level: str, keys: tuple) -> dict:
        """Those of the keys that an object has; what else it has is left over."""
        left = self.opened(value, level)
        its = {key: left.pop(key) for key in keys if key in left}
        self.closed(left, level)
        return its

    def closed(self, left: dict, level: str, turn: dict | None = None) -> str | None:
        """Note what is left over of an object; returns why its answer is no whole one, where it says so.

        turn: what was read of the object, if it is a turn: an API's answer that repeats it is no loss.
        """
        cut = None
        for key, value in left.items():
            name, end = f"{level}.{key}", end_of(value) if key in ENDS else None
            if not says(value) or end in FINISHED:
                continue
            inside = [] if name in REPEATING else list(objects_in(value))
            ends = [end, *(end_of(its[key]) for its in inside for key in ENDS if key in its)]
            cut_here = next(filter(CUT.__contains__, ends), None) if level in ("row", "message") else None
            if cut_here and not cut:
                cut = f"their finish_reason is {cut_here}, so they were cut off"
            if cut_here and key in ENDS:
                continue
            holds = next(filter(None, (_held(its, turn or {}) for its in inside)), None)
            if cut_here and level == "message":  # the turn is not trained, so it may lack what is there
                self.known[name] += 1
            elif name in CONVERT:
                self.unknown[name] = CONVERT[name].format(key)
            elif holds == "tools" and level == "row" and isinstance(in_json(value), list):
                self.unknown[name] = f"it holds tools: read them by --read-as {key}=tools"
            elif holds:
                self.unknown[name] = f"it holds {holds}: bring that into messages and tools"
            elif key in KNOWN[level] or key in self.ignore_keys:
                self.known[name] += 1
            else:
                self.unknown.setdefault(name, "")
        return cut

    def refuse_unknown(self) -> None:
        """Raise TrajectoryError where keys are left over that nobody knows; it names all of them."""
        if not self.unknown:
            return
        by_way_out = {}
        for name, way_out in self.unknown.items():
            by_way_out.setdefault(way_out, []).append(name)
        nameless = tuple(by_way_out.get("", ()))
        told = [", ".join(names) + (f" ({way_out})" if way_out else "") for way_out, names in by_way_out.items()]
        options = " ".join(f"--ignore-key {name}" for name in nameless)
        ways = f"; read them by --read-as, or leave them out by {options}" if nameless else ""
        raise TrajectoryError(f"nobody reads its keys {', '.join(told)}{ways}", nameless)


def one_of(readings: dict, what: str):
    """The one value that readings of one thing, {where: value}, agree on; None where all are empty."""
    said = {where: value for where, value in readings.items() if says(value)}
    (first, value), *others = said.items() or [("", None)]
    for other, its_value in others:
        one, two = (its.strip() if isinstance(its, str) else its for its in map(in_json, (value, its_value)))
        if one != two:
            raise TrajectoryError(f"{what} stands in both {first} and {other}, and they differ")
    return value


def rename(left: dict, key: str, its_field: str) -> None:
    """Move what stands under a key to a field; raises TrajectoryError where something else stands there."""
    if key in left:
        value, there = left.pop(key), left.get(its_field)
        is_empty = not says(in_json(there))
        left[its_field] = value if is_empty else one_of({its_field: there, key: value}, f"the {its_field}")


def objects_in(value):
    """Yield every object in a value, at any depth, also out of JSON strings."""
    value = in_json(value)
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from objects_in(item)


def end_of(reason) -> str | None:
    """How an answer ended, as the text in a finish_reason; None where it holds none. SGLang has an object there."""
    reason = reason[-1] if isinstance(reason, list) and reason else reason
    reason = reason.get("type") if isinstance(reason, dict) else reason
    return reason.lower() if isinstance(reason, str) else None


def _held(its: dict, turn: dict) -> str | None:
    """What of a conversation an object holds that the turn beside it does not say: a message, a call or tools."""
    thinks = turn and any(isinstance(its.get(key), (str, list)) and says(its[key]) for key in REASONING)
    speaks = "role" in its and says(its.get("content"))
    has_name = isinstance(its.get("name"), str)
    if thinks or speaks or any(says(its.get(key)) for key in OF_A_MESSAGE):
        kind, keys = "a message", ("content", *REASONING, *OF_A_MESSAGE)
    elif has_name and any(says(its.get(key)) for key in ARGUMENTS):
        kind, keys = "a tool call", ("name", *ARGUMENTS)
    else:
        return "tools" if has_name and ("parameters" in its or "input_schema" in its) else None
    return None if _said([its.get(key) for key in keys]) <= _said(turn) else kind


def _said(value) -> set[str]:
    """The texts and numbers in a value, at any depth, also out of JSON strings, but for ids, types and numberings."""
    value = in_json(value)
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in ("id", "type", "index")]
    if isinstance(value, list):
        return set().union(*map(_said, value))
    return {str(value).strip()} if says(value) else set()


# ---------------------------------------------------------------- thinking

# Names of what switches thinking on or off, what else stands in an object under such a name, and words for on and off.
SWITCHES = frozenset(
    "enable_thinking think thinking reasoning reasoning_effort thinking_budget budget_tokens max_thinking_tokens "
    "reasoning_budget".split()
)
OF_A_SWITCH = SWITCHES | {"type", "enabled", "effort", "max_tokens", "summary", "display"}
WORDS = {
    **dict.fromkeys("on true yes enabled enable adaptive auto default minimal low medium high xhigh max".split(), True),
    **dict.fromkeys("off false no none disabled disable".split(), False),
}
KWARGS = "chat_template_kwargs"
PLACES = ("metadata", "extra_body", KWARGS)  # where they stand, beside the row


def request_of(left: dict) -> tuple[dict, bool | None]:
    """What a row hands to the chat template, and what it says of thinking; None where it says nothing.

    The first are its chat_template_kwargs, and reasoning_effort, as vLLM does; the second stands under any name that
    requests have for it. Takes the columns that it understands out of the row.
    Raises TrajectoryError where two places differ about thinking.
    """
    objects = [left, *objects_in([left.get(place) for place in PLACES])]
    kwargs = {"reasoning_effort": left.get("reasoning_effort")}
    for given in (in_json(its.get(KWARGS)) for its in objects):
        kwargs |= given if isinstance(given, dict) else {}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}  # Arrow fills rows up with null
    said = {switch_of(its.get(key)) for its in objects for key in SWITCHES} - {None}
    if len(said) > 1:
        raise TrajectoryError("its switches differ about whether the model is to think; take the wrong one out")
    for key in SWITCHES:
        if switch_of(in_json(left.get(key))) is not None:
            del left[key]
    if isinstance(in_json(left.get(KWARGS)), dict):
        del left[KWARGS]
    return kwargs, said.pop() if said else None


def switch_of(value) -> bool | None:
    """Whether a switch is on: a boolean, a budget, a word, or an object of these; None where it is no switch."""
    if isinstance(value, dict) and value.keys() <= OF_A_SWITCH:
        said = {switch_of(item) for item in value.values()} - {None}
        return all(said) if said else None
    if isinstance(value, (bool, int, float)):
        return bool(value)
    return WORDS.get(value.lower()) if isinstance(value, str) and len(value) < 10 else None  # the longest has 8
