"""What the check says of a data set in a terminal."""

import json

from served_tokens.files.read import digest_of
from served_tokens.files.write import accounted
from served_tokens.llamafactory import TrainingSet
from served_tokens.marks import BLOCK_START, many
from served_tokens.prompts.chat_template import fingerprint
from served_tokens.proof.compare import NO_TRACE, NOT_SAID, Truth
from served_tokens.proof.findings import Findings
from served_tokens.rows.notes import NOT_SHOWN, listed

SHOWN_MISMATCHES, SHOWN_KEYS = 3, 10
TOO_LONG = "raise cutoff_len above {}, or leave out what is longer by step 2 --cutoff-len N --tokenizer MODEL"


def what_mends(found: Findings, provenance, truth: Truth, data_args) -> str:
    """What makes the samples exact, as far as it is known."""
    if causes := made_of_others(provenance, truth):
        return "; ".join(causes)
    if data_args.tokenized_path:
        return "is it the model of step 2 --tokens, and are the trajectories those of step 1?"
    too_long = [TOO_LONG.format(max(found.lengths))] if found.cut else []
    asked = "are the settings those that step 2 ended with, and the chat template and trajectories those of step 1?"
    return "; ".join(too_long + settings_that_fit(provenance, data_args)) or asked


def settings_that_fit(provenance, data_args) -> list[str]:
    """What to set where LlamaFactory may not train samples as they are."""
    from llamafactory.data.template import TEMPLATES

    served_as, merged = set(provenance["served_as"][:]), any(len(turns) > 1 for turns in provenance["turns"][:])
    fits = "qwen3_nothink" if "template" in served_as else "qwen3"
    blocks = TEMPLATES[data_args.template].format_user.slots if data_args.template in TEMPLATES else BLOCK_START
    mends = {
        f"template {data_args.template} writes no {BLOCK_START}; set template={fits}": BLOCK_START not in str(blocks),
        "set template=qwen3_nothink": "template" in served_as and data_args.template == "qwen3",
        "set mask_history=false": merged and data_args.mask_history,
        "set mask_history=true": not (merged or data_args.mask_history),
        "drop enable_thinking=false, or run step 2 with --no-thinking": "no-thinking" not in served_as
        and data_args.enable_thinking is False,
        "set enable_thinking=false": "no-thinking" in served_as and data_args.enable_thinking is not False,
        "set preserve_thinking=false": getattr(data_args, "preserve_thinking", False),
    }
    return [mend for mend, helps in mends.items() if helps]


def made_of_others(provenance, truth: Truth) -> list[str]:
    """What step 1 made the samples of that is not what they are compared with."""
    causes, template, model = [], fingerprint(truth.render), truth.tokenizer.name_or_path
    for source, told in dict(zip(provenance["source"][:], provenance["reading"][:])).items():
        file, made_of = truth.trajectories or source, json.loads(told)
        if made_of.get("sha256") not in (None, digest_of(file)):
            causes.append(f"{file} has changed since step 1 read it; run both steps again")
        if made_of.get("chat_template") not in (None, template):
            causes.append(f"step 1 took another --chat-template than {model}'s; set it, or model_name_or_path")
    return sorted(set(causes))


def problems_of(found: Findings, its: TrainingSet, truth: Truth, data_args) -> list[str]:
    """Why a data set is not to be trained on."""
    problems = []
    if sum(found.exact) < len(its.provenance):
        exact = f"{sum(found.exact)} of {len(its.provenance)} samples are exact"
        mend = what_mends(found, its.provenance, truth, data_args)
        problems.append(f"{exact}, so the model would not be trained on what it is served with; {mend}")
    unsaid = 0 if truth.is_cut or not found.trains else found.why_left_out[NOT_SAID] + found.reasons[NO_TRACE]
    if unsaid:
        without = many(unsaid, "turn or row has", "turns or rows have")
        problems.append(f"{without} no sample and no reason; run both steps again")
    if found.read_otherwise:
        rows = many(found.read_otherwise, "row is", "rows are")
        problems.append(f"{rows} read otherwise by step 1 than by the check itself")
    if found.reasoning_lost:
        prompts = many(found.reasoning_lost, "prompt is", "prompts are")
        problems.append(
            f"{prompts} trained both with and without reasoning to the same answer "
            f"({found.first_reasoning_lost}): in a log with a row for each call, past turns have lost theirs; step 2 "
            "--turns last trains the last turn of each row only"
        )
    if lost := found.lost_under.total():
        texts = many(lost, "text of the rows is", "texts of the rows are")
        under = ", ".join([*found.lost_under][:SHOWN_KEYS])
        problems.append(
            f"{texts} in no sample that should hold them (under {under}), as step 1 misreads their rows: write these "
            "in a shape of docs/rows.md; what is no part of the conversation step 1 leaves out by --ignore-key KEY"
        )
    return problems


def print_findings(found: Findings, max_samples: int | None) -> None:
    """Print what is found: first the texts of a few faults, then the numbers."""
    checked, kept = found.turns.total(), found.supervised_turns
    set_aside, turns = found.reasons.total(), sum(found.turns.elements())
    others = {"held out": found.held_out, "left out": turns - kept - found.held_out}
    for text in [mismatch.text for _, mismatch in found.mismatches[:SHOWN_MISMATCHES]] + found.lost:
        print(text)
    print(f"{found.name}: {found.settings}")
    print("  " + accounted("row", checked + set_aside, checked, "checked for samples", {"set aside": set_aside}))
    print("  " + accounted("turn", turns, kept, "in samples", others))
    lines = [(number, f"set aside: {reason}") for reason, number in found.reasons.most_common(SHOWN_KEYS)]
    for why, number in found.why_left_out.most_common():
        cut_short = why == NOT_SAID and max_samples is not None
        lines.append((number, f"left out: max_samples is {max_samples}" if cut_short else f"left out: {why}"))
    lines += [
        (found.kinds.total(), "mismatched"),
        (found.cut, "over cutoff_len"),
        (found.lost_under.total(), "of the rows' texts in no sample that should hold them"),
        *((number, f"of them under {key}") for key, number in found.lost_under.most_common(SHOWN_KEYS)),
        (
            found.other_targets,
            f"of the prompts are answered in two ways by the rows: {found.first_other_targets}",
        ),
    ]
    for number, said in lines:
        if number:
            print(f"  {number:>8} {said}")
    if found.recorded_turns:
        exact, turns = found.exact_by_record, found.recorded_turns
        print(f"  {exact:>8} exact by record, of {turns} turns whose token ids a server recorded")
    same, rows = found.rows_read_twice - found.read_otherwise, len(found.tasks)
    if found.rows_read_twice:
        of = many(rows, "row")
        print(f"  {same:>8} of {of} with samples the check reads by its own rules too, with the same result")
    if others := rows - found.rows_read_twice:
        print(f"  {others:>8} in other shapes: the check looks for each of their texts (docs/check.md)")
    print(f"  the longest sample has {max(found.lengths, default=0)} tokens")
    for line in found.reasoned.lines():
        print(f"  {line}")
    if found.unread and found.trains:  # of one for evaluation, the other has said them
        print(f"  {NOT_SHOWN}: {listed(found.unread)}")
