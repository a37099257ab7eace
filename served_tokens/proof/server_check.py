"""The trained prompts against those that a real server makes of the same conversations."""

import json
from collections import Counter, defaultdict
from typing import NamedTuple

from served_tokens.files.read import Place, read_rows
from served_tokens.marks import TrajectoryError
from served_tokens.proof.compare import SHOWN_TOKENS, Tokens, Truth, first_difference, named, supervised_spans
from served_tokens.proof.echo import END, echoed_turn
from served_tokens.proof.server import Refused, Server, ask_all, parsed_answer, prompt_ids, request_body
from served_tokens.proof.turn import served_turn
from served_tokens.rows.servers import STYLES, joined, served_tool
from served_tokens.rows.trajectory import Trajectory, read_trajectory

WAYS = {  # of an agent with its past turns
    "none": "sends them as the rows have them",
    "vllm": "sends the answers back as they came",
    "vllm-stream": "streams, and sends the answers back as they came",
}
TURNS_ASKED, DIFFERENCES_KEPT = 200, 3
PROMPT_END = 16  # tokens: more than a generation prompt has


class Question(NamedTuple):
    """A prompt that is trained, and the conversation that it is the prompt of.

    place: as it is shown to a person.
    messages, tools: of the row, in OpenAI's shape, reasoning in `reasoning_content`; texts, parts and tools as given.
    turn: messages[turn] is what the model writes after it.
    served_as, echo: as the sample says.
    trained: the token ids.
    targets: {k: token ids of what the model writes at turn k}, of the turns before.
    """

    place: str
    messages: list
    tools: list | None
    turn: int
    served_as: str
    echo: str
    trained: list
    targets: dict


class Compared(NamedTuple):
    """How many prompts were asked, and are exact, by way (see WAYS); what the server refused, in its words; the first
    differences as text, and what they come from; the ways that samples are made for."""

    asked: Counter
    exact: Counter
    refused: Counter
    differences: list
    causes: Counter
    echoes: set

    def off(self) -> int:
        """How many prompts are not those that their samples are made for."""
        return sum(self.causes.values()) + sum(self.refused.values())


def compare_with_server(questions, total: int, server: Server, reasoning_field: str, decode) -> Compared:
    """Ask the server for each prompt, in the way that its sample is made for and in the others.

    Args:
        questions: an iterator of `Question`; total: how many.
        reasoning_field: what reasoning is sent back as, "reasoning_content", "reasoning" or "none".
        decode: token ids -> text.
    Ends with one line where the server stops answering.
    """
    compared = Compared(Counter(), Counter(), Counter(), [], Counter(), set())

    def ask(question: Question) -> dict:
        return {way: served_ids(question, way, server, reasoning_field, decode) for way in ways_of(question, server)}

    for question, answers in ask_all(ask, questions, total, "ask the server"):
        for way, served in answers.items():
            _note(compared, question, way, served, decode)
    return compared


def ways_of(question: Question, server: Server) -> list[str]:
    """The ways that are asked: without past turns they are one, and others need a server that parses."""
    return [way for way in WAYS if way == question.echo or (server.parses and question.targets)]


def served_ids(question: Question, way: str, server: Server, reasoning_field: str, decode) -> list[int] | Refused:
    """The prompt that the server makes of the history of an agent."""
    thinking = question.served_as != "no-thinking"
    history = list(question.messages[: question.turn])
    for turn, target in question.targets.items() if way != "none" else ():
        history[turn] = _echoed(question, target, way, server, decode)
        if isinstance(history[turn], Refused):
            return history[turn]
    field = reasoning_field if question.served_as == "template" else "none"
    return prompt_ids(server, request_body(history, question.tools, field, thinking))


def _echoed(question: Question, target: list[int], way: str, server: Server, decode) -> dict | Refused:
    """A past turn as its answer came back: parsed by the server, or by the check's own reading of its rules."""
    thinking = question.served_as != "no-thinking"
    if not target:
        return {"role": "assistant", "content": ""}
    if not server.parses:
        return echoed_turn(decode(target), way, bool(question.tools), thinking)
    body = request_body([{"role": "user", "content": ""}], question.tools, "none", thinking)
    return parsed_answer(server, body, question.trained[-PROMPT_END:], target, way == "vllm-stream")


def _note(compared: Compared, question: Question, way: str, served: list[int] | Refused, decode) -> None:
    compared.asked[way] += 1
    compared.echoes.add(question.echo)
    if isinstance(served, Refused):
        compared.refused[f"{served.status}: {served.words[:200]}"] += way == question.echo
    elif served == question.trained:
        compared.exact[way] += 1
    elif way == question.echo:
        compared.causes[cause_of(decode(served), decode(question.trained), question)] += 1
        if len(compared.differences) < DIFFERENCES_KEPT:
            compared.differences.append(_described(question, served, decode))


def _described(question: Question, served: list[int], decode) -> str:
    at = first_difference(served, question.trained)
    lines = [f"{question.place}: the server's prompt differs from token {at} of {len(served)}:"]
    for side, ids in (("server ", served), ("trained", question.trained)):
        lines.append(
            f"  {side}: …{decode(ids[max(0, at - SHOWN_TOKENS) : at])!r} >>> {decode(ids[at : at + SHOWN_TOKENS])!r}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- what a difference comes from


def cause_of(served: str, trained: str, question: Question) -> str:
    """What is known to make two prompts differ like this, and the setting that mends it."""
    if served == trained:
        return "another tokenizer: the texts are the same and their ids are not; check with the model that is served"
    at = first_difference(served, trained)
    if trained.rfind("<tools>", 0, at) > trained.rfind("</tools>", 0, at):
        return _cause_in_tools(served, question.tools or [])
    thinks = [text.startswith("<think>", text.rfind("\n", 0, at) + 1) for text in (served, trained)]
    if thinks == [False, True]:
        return "the server does not show the reasoning that was sent; try another --reasoning-field"
    if thinks == [True, False]:
        return "the server shows reasoning that the samples leave out; step 2 --history-thinking template"
    contents = [message.get("content") for message in question.messages[: question.turn]]
    several = [[part["text"] for part in parts] for parts in contents if isinstance(parts, list) and len(parts) > 1]
    for style in STYLES:
        texts = [joined(parts, style) for parts in several]
        if texts and all(text in served for text in texts) and not all(text in trained for text in texts):
            return f"the server joins text parts otherwise; step 1 --server-style {style}"
    return "another chat template; step 1 --chat-template with the one that is served"


def _cause_in_tools(served: str, tools: list[dict]) -> str:
    shown = served.rpartition("<tools>\n")[2].partition("\n</tools>")[0].split("\n")
    for style in STYLES:
        try:
            if shown == [json.dumps(served_tool(tool, style), ensure_ascii=False) for tool in tools]:
                return f"the server prints tools otherwise; step 1 --server-style {style}"
        except TrajectoryError:
            continue
    return "the server prints tools as no style of step 1 does; take keys out of them but name, description, parameters"


# ---------------------------------------------------------------- for the check


def chosen_turns(turns_of_samples: list[list[int]], number: int) -> dict[int, list[int]]:
    """At most `number` of all turns, evenly spread: {position of the sample: its turns}."""
    turns = [(position, turn) for position, its_turns in enumerate(turns_of_samples) for turn in its_turns]
    chosen, number = defaultdict(list), min(number, len(turns))
    for index in range(number):
        position, turn = turns[index * len(turns) // number]
        chosen[position].append(turn)
    return chosen


def questions_about(samples: dict, built, truth: Truth, chosen: dict[int, list[int]]):
    """Yield the questions about the chosen turns of samples.

    Args:
        samples: {source: (how step 1 read it, {trajectory: [(position, turns, served_as)]})}
        built: the samples as LlamaFactory made them.
        chosen: see `chosen_turns`.
    """
    for source, (reading, of) in samples.items():
        for index, row, error in read_rows(source):
            its_samples = [sample for sample in of.get(index, ()) if sample[0] in chosen]
            if error or not its_samples:
                continue
            trajectory = read_trajectory(row, reading)
            for position, turns, served_as in its_samples:
                targets = _targets(trajectory, max(turns), served_as, truth)
                place = named(Place(source, index))
                messages = _sent_messages(trajectory)
                about = Question(place, messages, trajectory.tools_given, 0, served_as, reading.echo, [], targets)
                yield from questions_of(about, turns, chosen[position], built[position])


def _sent_messages(trajectory: Trajectory) -> list[dict]:
    """The messages as given; turns with their reasoning in its own field, wherever the row has it."""
    both = zip(trajectory.messages, trajectory.as_given)
    return [served if served["role"] == "assistant" else given for served, given in both]


def _targets(trajectory: Trajectory, before: int, served_as: str, truth: Truth) -> dict[int, list[int]]:
    """The token ids of what the model writes at each turn before one."""
    tokenize, targets = Tokens(truth.tokenizer), {}
    for turn in trajectory.turns:
        if turn < before:
            _, target = served_turn(trajectory.messages, trajectory.tools, turn, served_as, truth.render)
            targets[turn] = tokenize(written(target))
    return targets


def questions_of(about: Question, its_turns: list[int], chosen: list[int], sample: dict) -> list[Question]:
    """The questions about the chosen turns of a sample.

    Args:
        about: a question without `turn` and `trained`, with the targets of all turns of the trajectory.
        its_turns: those that the sample supervises, in order.
        sample: {"input_ids", "labels"} as LlamaFactory built it; a prompt is what stands before a supervised run.
    """
    return [
        about._replace(
            place=f"{about.place}, turn {turn}",
            turn=turn,
            trained=sample["input_ids"][:start],
            targets={k: target for k, target in about.targets.items() if k < turn},
        )
        for turn, (start, _) in zip(its_turns, supervised_spans(sample["labels"]))
        if turn in chosen
    ]


def written(target: str) -> str:
    """A target as the model writes it: a server stops at <|im_end|>."""
    return target.partition(END)[0]


def lines_of(compared: Compared, server: Server, of: int) -> list[str]:
    """The result, to be printed below that of the check."""
    asked = max(compared.asked.values(), default=0)
    exact = asked - compared.off()
    lines = [
        *compared.differences,
        f"  asked            {asked:>8}  of {of} prompts at {server.url}{server.prompts}",
        f"  exact by server  {exact:>8}  ({exact / max(1, asked):.2%})",
    ]
    lines += [f"  refused          {times:>8}  {words}" for words, times in compared.refused.most_common() if times]
    lines += [f"  differ           {times:>8}  {cause}" for cause, times in compared.causes.most_common()]
    for way, told in WAYS.items() if len(compared.asked) > 1 else ():
        lines.append(f"  {compared.exact[way]:>8} of {compared.asked[way]:>6}  are what an agent is served that {told}")
    return lines
