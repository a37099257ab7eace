"""Made-up trajectories with the statistics of EnvScaler's rows, for all benchmarks.

    python -m benchmarks.made_up FILE [--rows 9022]

EnvScaler-SFT-Traj-9K has 9,022 rows and 163,165 turns in 701 MB: 4,372 conversations (22.1 turns on average, 39 at
most, 9.75 user messages) and 4,650 non-conversations (14.3 turns, 29 at most, one query and the closing message), of
4,684 tasks, most of which have one row of each kind; 18.6 tools a row, 31 at most; 7,257 tokens of messages and tools,
and 495 or 591 tokens of reasoning a turn, 7,490 at most. The words are those of the embedded sample, in phrases, so a
token has about as many characters as there.
"""

import argparse
import functools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from step1_apply_tool_template import SAMPLE

ROWS = 9022
ONLY_CONVERSATION, ONLY_OTHER = 34 / 4684, 312 / 4684  # tasks with one row
ENVIRONMENTS = 195  # the tasks of each share tools and system prompt
TURNS = {"conversation": (22.1, 5, 39), "non_conversation": (14.3, 4.5, 29)}  # mean, deviation, most
REASONING = {"conversation": 495, "non_conversation": 591}  # tokens of a turn
QUERIES = 7.75 / 21.1  # of the turns of a conversation but the last
CLOSING = {"conversation": "###STOP###", "non_conversation": "Task finished"}
WORDS_OF_TOKEN = 0.64
PHRASE = 8  # words


def rows(number: int, turns: int | None = None):
    """Yield the first `number` rows, each the same whatever the number. `turns`: that many in each."""
    made, task = 0, 0
    while made < number:
        kind = random.Random(f"kind {task}").random()
        for traj_type in ("conversation", "non_conversation"):
            only_other = traj_type == "conversation" and kind < ONLY_OTHER
            if (
                made < number
                and not only_other
                and not (traj_type == "non_conversation" and kind > 1 - ONLY_CONVERSATION)
            ):
                yield row(task, traj_type, turns)
                made += 1
        task += 1


def row(task: int, traj_type: str, turns: int | None = None) -> dict:
    """One trajectory, in the columns of EnvScaler."""
    environment = task % ENVIRONMENTS
    tools, system = _environment(environment)
    source = random.Random(f"row {task} {traj_type}")
    mean, deviation, most = TURNS[traj_type]
    turns = turns or min(most, max(3, round(source.gauss(mean, deviation))))
    lengthy = source.lognormvariate(-0.08, 0.4)  # some rows think more in all their turns
    messages = [{"role": "system", "content": system}, _user(source, 60)]
    for turn in range(turns):
        tokens = min(7490, REASONING[traj_type] * lengthy * source.lognormvariate(-0.18, 0.6))
        reply = {"role": "assistant", "content": None, "reasoning_content": text(source, tokens)}
        if turn == turns - 1 or (traj_type == "conversation" and source.random() < QUERIES):
            closes = turn == turns - 1
            after = {"role": "user", "content": CLOSING[traj_type]} if closes else _user(source, 40)
            messages += [{**reply, "content": text(source, 90)}, after]
        else:
            arguments = {"record_id": _identity(source), "changes": {"note": text(source, 10), "amount": turn}}
            call = {"function": {"name": source.choice(tools)["function"]["name"], "arguments": json.dumps(arguments)}}
            data = {
                "record_id": _identity(source),
                "status": "open",
                "email": None,
                "total": round(source.uniform(1, 900), 2),
            }
            data["items"] = [
                {"id": _identity(source), "name": text(source, 10), "left": source.randint(0, 40)} for _ in range(2)
            ]
            messages += [
                {**reply, "tool_calls": [call]},
                {"role": "tool", "content": str({"success": True, "data": data})},
            ]
    task_info = {
        "env_id": f"env_{environment}",
        "task_id": f"env_{environment}-task_{task}",
        "task": text(source, 150),
        "init_config": json.dumps({_identity(source): text(source, 20) for _ in range(130)}),
    }
    user_messages = [message for message in messages if message["role"] == "user"]
    columns = {"tools": tools, "messages": messages, "user_messages": user_messages}
    return {
        "traj_type": traj_type,
        "task_info": task_info,
        **{name: json.dumps(value) for name, value in columns.items()},
        "steps": turns,
    }


def text(source: random.Random, tokens: float) -> str:
    """About so many tokens, in paragraphs."""
    chosen = source.choices(_phrases(), k=max(1, round(tokens * WORDS_OF_TOKEN / PHRASE)))
    return "\n\n".join(". ".join(chosen[at : at + 12]) for at in range(0, len(chosen), 12))


@functools.cache
def _phrases() -> list[str]:
    words = []
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        messages = json.loads(json.loads(line)["messages"])
        words += [word for message in messages for word in message.get("reasoning_content", "").split()]
    return [" ".join(words[at : at + PHRASE]) for at in range(len(words) - PHRASE)]


def _user(source: random.Random, tokens: float) -> dict:
    return {"role": "user", "content": text(source, tokens)}


def _identity(source: random.Random) -> str:
    return f"{source.choice('ABCDEFGH')}-{source.randint(100, 9999)}"


@functools.cache
def _environment(number: int) -> tuple[list[dict], str]:
    source = random.Random(f"environment {number}")
    tools = []
    for _ in range(min(31, max(8, round(source.gauss(18.6, 4.5))))):
        names = ["_".join(source.choice(_phrases()).lower().split()[:2]) for _ in range(4)]
        properties = {name: {"type": "string", "description": text(source, 10)} for name in names}
        description = "\n".join(text(source, 17) for _ in range(3))
        parameters = {"type": "object", "properties": properties, "required": names[:1]}
        name = f"{source.choice(('get', 'find', 'update', 'create'))}_{names[0]}"
        tools.append(
            {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
        )
    return tools, text(source, 250)


def write(path: Path, number: int, turns: int | None = None) -> Path:
    """The first rows as a file, whose name says the format: .jsonl, .json or .parquet."""
    if path.suffix == ".parquet":
        made = [{**its, "task_info": json.dumps(its["task_info"])} for its in rows(number, turns)]
        pq.write_table(pa.Table.from_pylist(made), path, row_group_size=512)
        return path
    opening, between, closing = ("[", ",\n", "]\n") if path.suffix == ".json" else ("", "\n", "\n")
    with path.open("w", encoding="utf-8") as file:
        file.write(opening)
        for count, its in enumerate(rows(number, turns)):
            file.write((between if count else "") + json.dumps(its, ensure_ascii=False))
        file.write(closing)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--turns", type=int, help="in each row (default: as in EnvScaler)")
    args = parser.parse_args()
    write(args.file, args.rows, args.turns)


if __name__ == "__main__":
    main()
