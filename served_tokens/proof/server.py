"""The trained prompts against those that a real server makes of the same conversations.

vLLM: `POST /v1/chat/completions/render` (field `token_ids`; seen on 0.32.0, where `vllm launch render` has it, without
a GPU, and `vllm serve --enable-scale-out`). Where there is none, the chat itself with one token to generate: vLLM's
`return_token_ids` gives `prompt_token_ids`, SGLang's `return_prompt_token_ids` the same in its first choice. vLLM's
`/tokenize` is never asked: it ignores `reasoning_content`.
"""

import contextlib
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import httpx
import jinja2

from served_tokens.files.read import Place, progress, read_rows
from served_tokens.marks import TrajectoryError
from served_tokens.proof.compare import Truth
from served_tokens.proof.tokens import mismatch_of, supervised_spans
from served_tokens.proof.told import claims_of
from served_tokens.proof.turn import echoed_messages, served_turn
from served_tokens.rows.anthropic import are_texts
from served_tokens.rows.servers import STYLES
from served_tokens.rows.trajectory import Reading, Trajectory, read_trajectory

API_KEY = "SERVER_API_KEY"  # the environment variable
RENDER, CHAT = "/v1/chat/completions/render", "/v1/chat/completions"
NO_SUCH_PATH = (403, 404, 405)  # 403: vLLM without --enable-scale-out
ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "return_token_ids": True, "return_prompt_token_ids": True}
REASONING_FIELDS = ("reasoning_content", "reasoning", "none")
NOT_EXACT = "the sample itself is not exact, see above"
STYLE_MENDS = "tools or text parts are written otherwise; step 1 --server-style "
HISTORY_MENDS = {
    "drop": "the server shows no reasoning of past turns; another --reasoning-field, or step 2 --history-thinking drop",
    "template": "the server shows reasoning of past turns; step 2 --history-thinking template",
}
UNKNOWN = (
    "no single setting makes its prompt; check with the model that is served and its chat template (step 1 "
    "--chat-template), and take keys out of tools but name, description, parameters"
)
SECONDS, TURNS_ASKED, DIFFERENCES_KEPT, WORDS_KEPT = 60, 200, 3, 200  # for an answer; the words in characters


@dataclass(frozen=True)
class Question:
    """A prompt that is trained, and what it is the prompt of."""

    place: str  # as a person is shown it
    row: dict  # in which it is the prompt of a message
    reading: Reading  # how step 1 read the row
    turn: int  # the position of that message
    served_as: str  # what the sample says of the history: "drop", "template" or "no-thinking"
    trained: list[int]  # its token ids


def questions_about(provenance, built, most: int, truth: Truth):
    """Yield a `Question` for each turn, or for so many that are evenly spread, less those that LlamaFactory cut off.

    provenance, built: what step 2 says of each sample, and what LlamaFactory made of it.
    """
    claims, readings = claims_of(provenance, truth.trajectories)
    every = [(place, claim, turn) for place in claims for claim in claims[place] for turn in claim.turns]
    asked, number = defaultdict(list), min(most, len(every))
    for place, claim, turn in (every[index * len(every) // number] for index in range(number)):
        asked[place].append((claim, turn))
    for source, reading in readings.items():
        for index, row in read_rows(source):
            place = Place(source, index)
            for claim, turn in asked.get(place, ()):
                trained = built[claim.position]
                spans = dict(zip(claim.turns, supervised_spans(trained["labels"])))
                if turn in spans:
                    ids, name = trained["input_ids"][: spans[turn][0]], f"{place}, turn {turn}"
                    yield Question(name, row=row, reading=reading, turn=turn, served_as=claim.served_as, trained=ids)


def request_for(question: Question, reasoning_field: str | None, truth: Truth) -> dict:
    """The request that a trained turn answers, as an agent sends it, less the model's name.

    reasoning_field: one of REASONING_FIELDS; without it a template history is sent with `reasoning_content`, any other
    without reasoning.
    """
    if reasoning_field is None:
        reasoning_field = "reasoning_content" if question.served_as == "template" else "none"
    trajectory, history = _conversation(question, truth)
    both = zip(history, trajectory.given.messages)
    messages = [past if past["role"] == "assistant" else given for past, given in both]
    body = {"messages": [_sent(message, reasoning_field) for message in messages]}
    if trajectory.given.tools:
        body["tools"] = trajectory.given.tools
    kwargs = trajectory.template_kwargs | ({"enable_thinking": False} if question.served_as == "no-thinking" else {})
    if kwargs:
        body["chat_template_kwargs"] = kwargs
    return body


def _conversation(question: Question, truth: Truth) -> tuple[Trajectory, list[dict]]:
    """The row as it is served, and the messages before the turn as the agent has them, which may echo answers."""
    its, echo = read_trajectory(question.row, question.reading), question.reading.echo
    before = its.messages[: question.turn]
    return its, echoed_messages(before, its.tools, question.served_as, echo, truth.render_of(its))


def _sent(message: dict, reasoning_field: str) -> dict:
    """A message as a client writes it: null is no text, and what a tool returned is text, text parts or JSON."""
    sent, content = {key: message[key] for key in ("role", "tool_call_id") if key in message}, message["content"]
    if are_texts(content):
        content = [{"type": "text", **part} for part in content]
    elif not isinstance(content, str):
        content = "" if content is None else json.dumps(content, ensure_ascii=False, default=str)
    sent["content"] = content
    if "reasoning_content" in message and reasoning_field != "none":
        sent[reasoning_field] = message["reasoning_content"]
    for index, call in enumerate(message.get("tool_calls", ())):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        function = {"name": call["function"]["name"], "arguments": arguments}
        call = {"id": call.get("id") or f"call_{index}", "type": "function", "function": function}
        sent.setdefault("tool_calls", []).append(call)
    return sent


# ---------------------------------------------------------------- the server


class Server:
    """The server at an address such as http://127.0.0.1:8000, with the name of its model; ends where there is none."""

    def __init__(self, url: str, timeout: float = SECONDS):
        self.url, headers = url.rstrip("/").removesuffix("/v1"), {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            self.client = httpx.Client(base_url=self.url, timeout=timeout, headers=headers)
            self.model = self.answer("GET", "/v1/models").json()["data"][0]["id"]
        except (httpx.InvalidURL, ValueError, TypeError, LookupError):
            is_one = f"is it an OpenAI-compatible server, with its API key, if it wants one, in {API_KEY}?"
            raise SystemExit(f"{self.url}: lists no model at /v1/models; {is_one}") from None

    def answer(self, method: str, path: str, body: dict | None = None) -> httpx.Response:
        content = json.dumps(body, default=str)  # NaN is in some schemas, which httpx refuses
        try:
            return self.client.request(method, path, content=content if body else None)
        except httpx.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
            raise SystemExit(f"{self.url}: {path} is not answered ({why}); is the server up, and the address right?")


def prompt_ids(server: Server, body: dict) -> list[int] | str:
    """The token ids that the model would be given for a request, or why the server refuses it, in its words."""
    ids, body = None, {"model": server.model, **body}
    response = server.answer("POST", RENDER, body)
    if response.status_code in NO_SUCH_PATH:
        response = server.answer("POST", CHAT, ONE_TOKEN | body)
    if response.is_error:
        return f"{response.status_code}: {response.text[:WORDS_KEPT]}"
    with contextlib.suppress(ValueError, AttributeError):
        answer = response.json()
        choice = (answer.get("choices") or [{}])[0]
        ids = answer.get("token_ids") or answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if not ids:
        knows = "a vLLM from 0.10.2 on or an SGLang that knows return_prompt_token_ids gives them"
        raise SystemExit(f"{server.url}: answers without the ids of the prompt; {knows}")
    return ids


# ---------------------------------------------------------------- the comparison


@dataclass
class Compared:
    """How many of the prompts were asked, the server's words for those it refused, and why others differ."""

    prompts: int
    asked: int = 0
    refused: Counter = field(default_factory=Counter)
    causes: Counter = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)  # the first, as text

    @property
    def off(self) -> int:
        """How many prompts are not those of the server."""
        return self.refused.total() + self.causes.total()


def compare_with_server(
    server: Server, provenance, built, max_turns: int, reasoning_field: str | None, truth: Truth
) -> Compared:
    """Ask the server for at most `max_turns` prompts; ends with one line where it stops answering.

    For the others see `questions_about` and `request_for`.
    """
    compared = Compared(sum(map(len, provenance["turns"][:])))
    with progress("ask the server", " turns", min(max_turns, compared.prompts)) as bar:
        for question in questions_about(provenance, built, max_turns, truth):
            compared.asked += 1
            served = prompt_ids(server, request_for(question, reasoning_field, truth))
            if isinstance(served, str):
                compared.refused[served] += 1
            elif served != question.trained:
                compared.causes[cause_of(served, question, truth)] += 1
                sides = [{"input_ids": ids, "labels": []} for ids in (served, question.trained)]
                said = mismatch_of(*sides, truth.tokenizer.decode).text
                compared.differences.append(f"{question.place}: {said}")
            bar.update()
    del compared.differences[DIFFERENCES_KEPT:]
    return compared


def cause_of(served: list[int], question: Question, truth: Truth) -> str:
    """Why a prompt is not the server's: the one setting with which the check's own definition makes the server's."""
    tried = {NOT_EXACT: question}
    for style in STYLES:
        tried[STYLE_MENDS + style] = replace(question, reading=replace(question.reading, server_style=style))
    for served_as, mend in HISTORY_MENDS.items():
        tried[mend] = replace(question, served_as=served_as)
    for cause, other in tried.items():
        with contextlib.suppress(TrajectoryError, jinja2.TemplateError):
            it, history = _conversation(other, truth)
            render = truth.render_of(it)
            prompt, _ = served_turn(it.messages, it.tools, other.turn, other.served_as, render, history)
            if truth.tokenizer.encode(prompt, add_special_tokens=False) == served:
                return cause
    return UNKNOWN


def lines_of(compared: Compared, server: Server) -> list[str]:
    """The result, to be printed below that of the check."""
    exact = compared.asked - compared.off
    return [
        f"  asked            {compared.asked:>8}  of {compared.prompts} prompts at {server.url}",
        f"  exact by server  {exact:>8}  ({exact / max(1, compared.asked):.2%})",
        *(f"  refused          {times:>8}  {words}" for words, times in compared.refused.most_common()),
        *(f"  differ           {times:>8}  {cause}" for cause, times in compared.causes.most_common()),
    ]
