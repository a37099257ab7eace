"""What real servers made of requests and answers (tests/server/README.md), as tests take it."""

import json
import re

from conftest import ROOT


def read(name: str):
    return json.loads((ROOT / "tests" / "server" / f"{name}.json").read_text(encoding="utf-8"))


def marked(its: dict) -> dict:
    """A request of which SGLang makes vLLM's prompt with its mark on each tool, or which it refuses too."""
    tools = re.compile("<tools>\n.*?</tools>", re.DOTALL)
    prompt = tools.sub(lambda its: its[0].replace("}\n", ', "defer_loading": null}\n'), its.get("prompt", ""), count=1)
    return {**its, "prompt": prompt} if prompt else its


def with_others(prompts: list[dict], others: list[dict], *keys: str) -> list[dict]:
    """SGLang's prompts, of which a file holds those that differ from vLLM's by more than the mark."""
    held = {tuple(its[key] for key in keys): its for its in others}
    return [held.get(tuple(its[key] for key in keys), marked(its)) for its in prompts]


VLLM = read("vllm_render")
SGLANG = with_others(VLLM, read("sglang_render"), "name", "reasoning_sent_as") + read("sglang_edges")
ECHOED_BY_VLLM = read("vllm_echo")["prompts"]
AS_IF_SGLANG = [{**its, "echo": its["echo"].replace("vllm", "sglang")} for its in ECHOED_BY_VLLM]
ECHOED_BY_SGLANG = with_others(
    AS_IF_SGLANG, read("sglang_echo")["prompts"], "name", "turn", "echo", "reasoning_sent_as"
)
