"""Asking a server: the prompt ids that it makes of a chat request, and the message that it makes of an answer.

vLLM: `POST /v1/chat/completions/render` (field `token_ids`; seen on 0.32.0, where `vllm launch render` has it, without
a GPU, and `vllm serve --enable-scale-out`). Where there is none, the chat itself with one token to generate: vLLM's
`return_token_ids` gives `prompt_token_ids`, SGLang's `return_prompt_token_ids` the same in its first choice. vLLM's
`/tokenize` is never asked: it ignores `reasoning_content`.
"""

import itertools
import json
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
from tqdm import tqdm

API_KEY = "SERVER_API_KEY"  # the environment variable
RENDER, CHAT, DERENDER = (f"/v1/chat/completions{path}" for path in ("/render", "", "/derender"))
AT_ONCE = 8  # requests
SECONDS = 60  # that an answer may take
TRIES, FIRST_WAIT = 5, 0.5  # of a request to a busy server; seconds, doubled each time
BUSY = (429, 502, 503, 504)
JSON = {"Content-Type": "application/json"}
ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "return_token_ids": True, "return_prompt_token_ids": True}


class Server(NamedTuple):
    """A server that answers.

    url: as given, without a slash at the end.
    model: the name that it serves the model under.
    prompts: the path that prompt ids are asked at.
    parses: whether it parses what a model wrote (`/derender`).
    """

    url: str
    model: str
    prompts: str
    parses: bool
    client: httpx.Client


class Refused(NamedTuple):
    """A request that the server does not answer, and its own words."""

    status: int
    words: str


def connect(url: str, timeout: float = SECONDS) -> Server:
    """The server at an address such as http://127.0.0.1:8000; ends with one line where there is none."""
    url = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get(API_KEY)
    client = httpx.Client(base_url=url, timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
    server = Server(url, "", CHAT, False, client)
    listed = _answer(server, "GET", "/v1/models")
    try:
        model = listed["data"][0]["id"]
    except (TypeError, KeyError, IndexError):
        raise SystemExit(f"{url}: lists no model at /v1/models; is it an OpenAI-compatible server?") from None
    empty = {"model": model, "messages": []}  # which is refused in another way where there is such a path
    renders, parses = (_is_there(_answer(server, "POST", path, empty)) for path in (RENDER, DERENDER))
    return server._replace(model=model, prompts=RENDER if renders else CHAT, parses=parses)


def prompt_ids(server: Server, body: dict) -> list[int] | Refused:
    """The token ids that the model would be given for a request, see `request_body`."""
    extra = ONE_TOKEN if server.prompts == CHAT else {}
    answer = _answer(server, "POST", server.prompts, {"model": server.model, **extra, **body})
    if isinstance(answer, Refused):
        return answer
    choice = (answer.get("choices") or [{}])[0]
    ids = answer.get("token_ids") or answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if not ids:
        raise SystemExit(
            f"{server.url}: answers without the ids of the prompt; a vLLM from 0.10.2 on or an SGLang that knows "
            "return_prompt_token_ids gives them"
        )
    return ids


def parsed_answer(server: Server, body: dict, prompt: list[int], target: list[int], streamed: bool) -> dict | Refused:
    """The message that the server makes of what the model wrote after a prompt, as a client gets it.

    Args:
        body: of the request that it is the answer to.
        prompt, target: token ids; of the prompt the end will do, and the target is without the <|im_end|> that ends it.
    Returns {"role", "content", "reasoning_content", "tool_calls"}, null or empty where there is none.
    """
    choice = {"index": 0, "token_ids": target, "finish_reason": "stop"}
    wrote = {"request_id": "answer", "choices": [choice]}
    asked = {"chat_request": {"model": server.model, **body, "stream": streamed}, "prompt_token_ids": prompt}
    asked |= {"stream": True, "generate_chunk": wrote} if streamed else {"generate_response": wrote}
    answer = _answer(server, "POST", DERENDER, asked)
    if isinstance(answer, Refused):
        return answer
    message = answer["chunk"]["choices"][0]["delta"] if streamed else answer["choices"][0]["message"]
    reasoning, calls = message.get("reasoning") or message.get("reasoning_content"), message.get("tool_calls") or []
    parsed = {"role": "assistant", "content": message.get("content"), "reasoning_content": reasoning}
    return {**parsed, "tool_calls": _whole_calls(calls) if streamed else calls}


def _whole_calls(deltas: list[dict]) -> list[dict]:
    """The calls that the pieces of a stream make up."""
    calls = {}
    for delta in deltas:
        call = calls.setdefault(delta["index"], {"id": f"call_{delta['index']}", "type": "function"})
        function = call.setdefault("function", {"name": "", "arguments": ""})
        for key in function:
            function[key] += delta["function"].get(key) or ""
    return list(calls.values())


def ask_all(ask, questions, total: int, desc: str):
    """Yield (question, ask(question)) in order, AT_ONCE at a time, under a progress bar."""
    pool, waiting = ThreadPoolExecutor(AT_ONCE), deque()
    with tqdm(total=total, desc=desc, unit="turn", mininterval=1) as bar:
        try:
            for question in itertools.chain(questions, [None] * 2 * AT_ONCE):
                if question is not None:
                    waiting.append((question, pool.submit(ask, question)))
                if waiting and (question is None or len(waiting) > 2 * AT_ONCE):
                    asked, answer = waiting.popleft()
                    yield asked, answer.result()
                    bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- what is sent


def request_body(messages: list[dict], tools: list[dict] | None, reasoning_field: str, thinking: bool = True) -> dict:
    """A chat request as an agent sends it, less the model's name.

    Args:
        messages: OpenAI messages, reasoning in `reasoning_content`; calls may lack id and type, their arguments be
            objects.
        reasoning_field: what reasoning is sent as, "reasoning_content", "reasoning" or "none".
    """
    sent, ids = [], []
    for message in messages:
        if message["role"] == "assistant":
            sent.append(_sent_turn(message, reasoning_field, len(sent)))
            ids = [call["id"] for call in sent[-1].get("tool_calls", ())]
        elif message["role"] == "tool":
            answers = message.get("tool_call_id") or (ids.pop(0) if ids else "call")
            sent.append({"role": "tool", "tool_call_id": answers, "content": _sent_output(message.get("content"))})
        else:
            sent.append({"role": message["role"], "content": _sent_text(message.get("content"))})
    body = {"messages": sent, **({"tools": tools} if tools else {})}
    return body if thinking else {**body, "chat_template_kwargs": {"enable_thinking": False}}


def _sent_turn(message: dict, reasoning_field: str, position: int) -> dict:
    sent = {"role": "assistant", "content": _sent_text(message.get("content"))}
    reasoning = message.get("reasoning_content")
    if reasoning_field != "none" and reasoning is not None:
        sent[reasoning_field] = reasoning
    calls = [_sent_call(call, f"call_{position}_{index}") for index, call in enumerate(message.get("tool_calls") or [])]
    return {**sent, "tool_calls": calls} if calls else sent


def _sent_call(call: dict, default_id: str) -> dict:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    function = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id") or default_id, "type": "function", "function": function}


def _sent_text(content):
    if isinstance(content, list):
        return [{"type": "text", **part} for part in content]
    return "" if content is None else content


def _sent_output(content):
    """Of a tool; an object is sent as JSON."""
    is_parts = isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content)
    if content is None or isinstance(content, str) or is_parts:
        return _sent_text(content)
    return json.dumps(content, ensure_ascii=False, default=str)


# ---------------------------------------------------------------- how it is sent


def _is_there(answer) -> bool:
    """Whether a path is served: `vllm serve` answers 403 unless it was started with --enable-scale-out."""
    return not (isinstance(answer, Refused) and answer.status in (403, 404, 405))


def _answer(server: Server, method: str, path: str, body: dict | None = None) -> dict | list | Refused:
    """The JSON that the server answers; ends with one line where it does not answer, and after some tries."""
    wait, problem = FIRST_WAIT, ""
    content = None if body is None else json.dumps(body, default=str)  # NaN is in some schemas, which httpx refuses
    for attempt in range(TRIES):
        if attempt:
            time.sleep(wait)
            wait *= 2
        try:
            response = server.client.request(method, path, content=content, headers=JSON)
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise SystemExit(f"{server.url}: no server answers ({error}); start it, or correct the address") from None
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}, {server.client.timeout.read:g} s are the limit"
            continue
        if response.status_code not in BUSY:
            return _read(server, path, response)
        problem = f"status {response.status_code}"
        wait = max(wait, _asked_to_wait(response))
    raise SystemExit(f"{server.url}: does not answer {path} ({problem}, {TRIES} tries); is it overloaded?")


def _read(server: Server, path: str, response: httpx.Response) -> dict | list | Refused:
    if response.status_code == 401:
        raise SystemExit(f"{server.url}: wants an API key; set the environment variable {API_KEY}")
    if response.is_error:
        return Refused(response.status_code, _words(response))
    try:
        return response.json()
    except ValueError:
        raise SystemExit(f"{server.url}: {path} answers no JSON but {response.text[:60]!r}") from None


def _words(response: httpx.Response) -> str:
    """Of a refusal, as OpenAI's API, vLLM, SGLang and FastAPI word it."""
    try:
        error = response.json()
        error = error.get("error", error) if isinstance(error, dict) else error
        return str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
    except ValueError:
        return response.text


def _asked_to_wait(response: httpx.Response) -> float:
    """Seconds, of the header Retry-After."""
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), SECONDS) if seconds.isdigit() else 0.0
