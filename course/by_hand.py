"""Assignment 4 without a network: a probe chooses the tokens, and how certain they are."""

import small


def begun(tokenizer, repeat_topic=True, **settings):
    """An answer before its first pass, and its first phase."""
    from config import MethodConfig, SampleConfig
    from decode import Answer, next_round
    from methods import DECODERS

    method = MethodConfig("planned", repeat_topic=repeat_topic)
    answer = Answer("the otter", tokenizer, SampleConfig(**settings), method, DECODERS["planned"])
    return answer, next_round(answer)


def wished(phase, name, length):
    """The phase after a topic was written into the plan."""
    tokenizer = phase.tokenizer
    for token in (tokenizer.topic, *tokenizer.encode(name), tokenizer.length_id(length), tokenizer.topic_end):
        phase = phase.write(token)
    return phase


def scribble(rng, answer, phase, rounds):
    """Write random tokens that the grammar allows until the round's plan is finished; no network takes part.

    Returns the next phase and the tokens that were forced. `rounds`: after so many the answer ends.
    """
    import numpy as np

    tokenizer, forced = answer.tokenizer, 0
    likely = [tokenizer.topic] * 3 + ([tokenizer.sync] if len(answer.rounds) < rounds else [tokenizer.eos])
    likely += list(tokenizer.encode("otter food in the river")) * 2 + [tokenizer.length_id(n) for n in (1, 2, 3)] * 4
    while phase is not None and type(phase).__name__ == "WrittenPlan" and len(answer.rounds) <= rounds:
        tokens = [t for t in likely if answer.grammar.allowed()[t]]
        written = len(answer.layout)
        phase = phase.write(int(rng.choice(tokens or np.flatnonzero(answer.grammar.allowed()))))
        if type(phase).__name__ == "WrittenPlan":
            before = len(answer.layout)
            phase = phase.force()
            forced += len(answer.layout) - before if len(answer.layout) > written else 0
    return phase, forced


def planned(rng, limit, rounds):
    """What an answer of random plans has noted."""
    from decode import next_round
    from masks import PLAN

    tokenizer = small.tokenizer()
    answer, phase = begun(tokenizer, max_tokens=limit)
    forced, phases = 0, []
    for _ in range(rounds + 1):
        if phase is None:
            break
        phase, n = scribble(rng, answer, phase, rounds)
        forced += n
        phases.append(type(phase).__name__)
        if phases[-1] == "Denoise":  # as if its spans were finished
            phase = next_round(answer)
    plan = [i for i in range(len(answer.layout)) if answer.layout.kind[i] == PLAN]
    return {
        "plan": small.names([answer.layout.token[i] for i in plan], tokenizer),
        "round of each token": [answer.layout.round[i] for i in plan],
        "rounds": [[small.names(r.text, tokenizer), [[small.names(t.name, tokenizer), t.length] for t in r.topics]]
                   for r in answer.rounds],
        "phase after each plan": phases,
        "tokens written without a pass": forced,
        "critical path": answer.critical_path,
        "cut": answer.cut,
        "cached": answer.cached,
    }  # fmt: skip


def denoised(phase, sure, threshold):
    """The phase after spans were filled, what its passes were, and in which of them each entry was filled.

    `sure`: how certain the token of each entry is.
    """
    from decode import Reply

    passes, filled = [], {}
    while phase is not None and len(passes) < 60:
        readings = phase.readings()
        passes.append({"computes": small.ranges_of(phase.entries()), "quotas": [r.quota for r in readings],
                       "reads": [small.ranges_of(r.entries) for r in readings]})  # fmt: skip
        replies = []
        for reading in readings:
            kept = sorted(reading.entries, key=lambda i: -sure[i])[: reading.quota]
            kept += [i for i in reading.entries if threshold and sure[i] >= threshold]
            filled |= {i: len(passes) for i in kept}
            replies.append(Reply(reading, [65] * len(reading.entries), [i in kept for i in reading.entries]))
        phase = phase.take(replies)
    return phase, passes, filled


def draw_passes(expected, came):
    """What the passes around the first wrong one compute."""
    runs = lambda text: ([min(int(i), 9999) for i in run.split("-")] for run in text.split())  # 9999: or it takes hours
    entries = lambda text: {i for run in runs(text) for i in range(run[0], run[-1] + 1)}
    rows = [*zip(expected["passes"], came["passes"])]
    wrong = lambda e, c: e["computes"] != c["computes"] or c["error"] > 1e-4
    first = next((n for n, (e, c) in enumerate(rows) if wrong(e, c)), None)
    if first is None:
        return f"{len(rows)} passes are right, of {len(expected['passes'])}; {len(came['passes'])} came"
    shown = [(n, e, c, entries(e["computes"]), entries(c["computes"])) for n, (e, c) in enumerate(rows)]
    shown = shown[max(0, first - 4) : first + 3]
    at = min((i for *_, right, was in shown for i in right ^ was), default=0) // 60 * 60
    lines = [f"a line per pass, a column per layout entry from {at} on",
             "# computed, . not; wrong: X need not be, O should be"]  # fmt: skip
    for n, e, c, right, was in shown:
        ink = "".join(".XO#"[(i in was) + 2 * (i in right)] for i in range(at, at + 60))
        lines.append(f"{n:3} {e['stage'][:5]:5} {ink}" + f" {c['error']:.0e}" * (c["error"] > 1e-4))
    return "\n".join(lines)
