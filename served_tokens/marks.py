"""What all wings share: the marks of chat texts, the error of a row, counts, and a few words about JSON values."""

import functools
import itertools
import json
import re
from collections import Counter
from dataclasses import fields

BLOCK_START, BLOCK_END = "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (  # of Qwen's tokenizers: in a text they are no text but a mark, to the model
    BLOCK_START,
    BLOCK_END,
    "<|endoftext|>",
    *(f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad", "vision") for edge in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
)
HELD_OUT = "they are held out, to be evaluated"  # why turns have no sample to be trained on
IGNORE_INDEX = -100  # LlamaFactory's extras/constants.py: no loss on this token

# Keys that say nothing of what the model sees or writes, at each level of a row (see `rows.keys`): the reading leaves
# them, and the proof looks for none of their texts.
_KNOWN = {
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
    "parallel_tool_calls function_call traj_type task_info user_messages steps",
    "message": "id uuid index turn_idx timestamp date created created_at model model_name object provider usage cost "
    "latency duration score reward logprobs refusal name tool_call_id tool_name error is_error signature "
    "annotations extra response_metadata usage_metadata metadata ts time message_id sender agent message_type "
    "tool_call_ids step turn_id thought_signatures token_count reasoning_tokens parentUuid",
    "call": "index signature cache_control caller extra_content call_id status requestor",
    "part": "id index cache_control citations signature is_error annotations",
    "tool": "cache_control strict annotations title output_schema outputSchema returns examples",
}
KNOWN_KEYS = {level: frozenset(words.split()) for level, words in _KNOWN.items()}
_MARKS = re.compile(f"({re.escape(BLOCK_START)}|{re.escape(BLOCK_END)})")


class TrajectoryError(ValueError):
    """What is wrong with one trajectory, and in which message.

    keys: the keys that nobody reads, as "message.note", where that is what is wrong.
    """

    def __init__(self, reason: str, keys: tuple[str, ...] = ()):
        super().__init__(reason)
        self.keys = keys


class Counts:
    """What is counted of rows, in the fields of a dataclass: numbers, Counters, arrays, dicts of what is first."""

    def add(self, other: "Counts") -> None:
        """Count what another one of this kind has counted of other rows."""
        for name in (its.name for its in fields(other)):
            mine, more = getattr(self, name), getattr(other, name)
            if isinstance(mine, Counts):
                mine.add(more)
            elif isinstance(mine, int):
                setattr(self, name, mine + more)
            elif isinstance(mine, Counter):
                mine.update(more)
            elif isinstance(mine, dict):
                setattr(self, name, more | mine)
            else:
                mine.extend(more)


def many(number: int, one: str, more: str = "") -> str:
    """A number of things, for people: many(2, "row"), many(1, "row is", "rows are")."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def decoded(value, name: str, kind=list):
    """A list, an object (kind: dict) or either, also out of a JSON string of one; an empty one for null or nothing.

    Raises TrajectoryError, which begins with the name of the value and its verb, as "tools is".
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"{name} not valid JSON ({error})") from None
    if value in (None, "", [], {}):
        return {} if kind is dict else []
    if not isinstance(value, kind):
        expected = {list: "a list", dict: "a JSON object"}.get(kind, "a list or an object")
        raise TrajectoryError(f"{name} not {expected} but {kind_of(value)}")
    return value


def in_json(value):
    """A list or object, also out of a JSON string of one; any other value is left as it is."""
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def kind_of(value) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def says(value) -> bool:
    """Whether there is anything in it: a number, a boolean or a text, at any depth of lists and objects."""
    if isinstance(value, dict):
        return any(map(says, value.values()))
    if isinstance(value, list):
        return any(map(says, value))
    return value is not None and value != ""


def remembering(encode, characters: int = 1 << 22):
    """encode(text) -> token ids, which tokenizes no text again; all is forgotten after so many characters."""
    known, held = {}, 0

    def remembered(text: str) -> list[int]:
        nonlocal held
        ids = known.get(text)
        if ids is None:
            if held > characters:
                known.clear()
                held = 0
            held += len(text)
            ids = known[text] = encode(text)
        return ids

    return remembered


class Tokens:
    """The token ids of texts, as a tokenizer makes them of a whole text.

    A tokenizer splits a text at its special tokens first, and tokenizes what is between them by itself. So a stretch
    that several texts share is tokenized once; of the longest text it is seen that this is so.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.of_whole = functools.partial(tokenizer.encode, add_special_tokens=False)
        self.of_stretch = remembering(self.of_whole)
        self.proven = 0  # characters of the longest text of which it was seen

    def __call__(self, text: str) -> list[int]:
        ids = [*itertools.chain.from_iterable(map(self.of_stretch, _MARKS.split(text)))]
        if len(text) > 2 * self.proven:
            self.proven = len(text)
            if ids != self.of_whole(text):
                raise SystemExit(
                    f"the tokenizer makes other tokens of a text than of its parts between {BLOCK_START} and "
                    f"{BLOCK_END}; check with a model of which these are special tokens"
                )
        return ids
