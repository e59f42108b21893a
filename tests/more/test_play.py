"""The page to play with: what its server refuses and answers, what a recording tells of each slot, what a browser shows."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from functools import partial

import pytest
from conftest import SENTENCES, each
from test_show import MODELS, random_sampler

import decode
from config import METHODS, MethodConfig, SampleConfig
from demo import play
from demo.lessons import LESSONS, PROMPTS
from plumbing.settings import ROOT, refuse_idle
from sample import Sampler
from show.record import record, rows
from unmask import certainty

PROMPT = "Tell me about the river, the food and the ruler of Brivok."
QUICK = {"threshold": 0.9}


@pytest.fixture(scope="module")
def server():
    names = [name for name in play.SHIPPED if (ROOT / f"checkpoints/{name}.safetensors").exists()]
    server = play.Server({name: play.Model(ROOT / f"checkpoints/{name}.safetensors") for name in names}, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def asking(server, method, path, body=None, **headers):
    """A connection that has sent a request; with None in place of a header it has none."""
    host = f"127.0.0.1:{server.server_port}"
    text = body if isinstance(body, str) else json.dumps(body)
    post = {"Origin": f"http://{host}", "Content-Type": "application/json", "Content-Length": str(len(text.encode()))}
    headers = {
        "Host": host,
        **(post if method == "POST" else {}),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(text.encode() if method == "POST" else None)
    return connection


def ask(server, method, path, body=None, **headers):
    """(status, lines of JSON or text, headers) of a reply."""
    connection = asking(server, method, path, body, **headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    lines = [json.loads(line) for line in text.splitlines()] if "json" in response.headers["Content-Type"] else text
    return response.status, lines, response.headers


def request(prompt=PROMPT, model="tasks/planned", decode="planned", id="1", **settings):
    return {"id": id, "model": model, "decode": decode, "prompt": prompt, "settings": settings}


# ---------------------------------------------------------------- what the server refuses


def test_other_hosts_and_origins_are_refused(server):
    port, own = server.server_port, "Only this machine's own page may ask for answers."
    assert server.server_address[0] == "127.0.0.1"
    for host in each(["evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", None]):
        for path in ("/", "/player", "/options", "/playground.js"):
            status, (line,), _ = ask(server, "GET", path, Host=host)
            assert (status, line) == (403, {"error": "This page is for this machine alone."})
        assert ask(server, "POST", "/answer", request(), Host=host, Origin=f"http://{host}")[:2] == (
            403,
            [{"error": own}],
        )
    for origin in each([None, "null", "http://evil.example", f"https://127.0.0.1:{port}", f"http://localhost:{port}"]):
        for path in ("/answer", "/cancel"):
            assert ask(server, "POST", path, request(), Origin=origin)[:2] == (403, [{"error": own}])
    local = f"localhost:{port}"
    assert ask(server, "GET", "/", Host=local)[0] == 200
    assert ask(server, "POST", "/cancel", {"id": "x"}, Host=local, Origin=f"http://{local}")[0] == 200


def test_what_is_no_request_of_the_page_gets_one_sentence(server):
    large = "x" * (play.LARGEST + 1)
    for path, body, headers in each([
        ("/answer", request(), {"Content_Type": "text/plain"}), ("/answer", request(), {"Content_Type": None}),
        ("/answer", large, {}), ("/answer", "", {"Content_Length": "9" * 5000}), ("/answer", "", {"Content_Length": "-1"}),
        ("/answer", "", {"Content_Length": None}), ("/answer", "{", {}), ("/answer", "[" * 60000, {}), ("/answer", "[]", {}),
        ("/answer", {**request(), "more": 1}, {}), ("/answer", {**request(), "prompt": 3}, {}), ("/cancel", {"id": []}, {}),
        ("/answer", {**request(), "settings": []}, {}), ("/nowhere", {"id": "1"}, {}), ("/answer", "9" * 5000, {}),
    ]):  # fmt: skip
        status, (line,), _ = ask(server, "POST", path, body, **headers)
        assert status == 400 and re.fullmatch(r"[A-Z][^\n]+\.", line["error"])
    assert ask(server, "GET", "/../config.py")[0] == ask(server, "GET", "/favicon.ico")[0] == 404


def test_pages_may_load_nothing_but_what_is_theirs(server):
    for path, script in each([("/", "'self'"), ("/playground.js", "'self'"), ("/player", "'unsafe-inline'")]):
        status, text, headers = ask(server, "GET", path)
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert status == 200 and policy["default-src"] == "'none'" and policy["script-src"] == script
        assert policy["frame-ancestors"] == "'self'" and headers["X-Content-Type-Options"] == "nosniff"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=\"", text)
        assert not headers["Access-Control-Allow-Origin"]


def test_bad_input_gets_the_sampler_s_sentence_and_the_next_answer_comes(server):
    for changes, why in each([
        ({"steps_ratio": 2}, "--steps_ratio 2.0: expected at least 0 and at most 1"), ({"temperature": 0.001}, "0.01"),
        ({"seed": 1.5}, "seed: expected a whole number"), ({"apart": 1}, "apart: expected true or false"),
        ({"threshold": None}, "threshold: expected a number"), ({"device": "cuda"}, "there is no setting 'device'"),
        ({"decode": "ar"}, "decodes as planned"), ({"model": "../secret"}, "its model is not here"),
        ({"plan": "food"}, "expected topics with lengths"), ({"top_p": 0.5}, "at temperature 0"),
        ({"max_tokens": 4096}, "more than 4096"), ({"order": "margin", "threshold": 0.5}, "--order margin"),
        ({"length_scale": 10**400}, "too large"), ({"order": "best"}, "expected one of"), ({"max_tokens": 0}, "at least 1"),
    ]):  # fmt: skip
        sent = request()
        for name, value in changes.items():
            (sent if name in sent else sent["settings"])[name] = value
        *_, line = ask(server, "POST", "/answer", sent)[1]
        assert why in line["error"] and "\n" not in line["error"]
    assert "answer" in ask(server, "POST", "/answer", request(**QUICK))[1][-1] and not server.cancelled


# ---------------------------------------------------------------- what the server answers


def texts(answer):
    return [
        "".join(token["text"] for token in span["slots"]) for round_ in answer["rounds"] for span in round_["spans"]
    ]


def test_an_answer_is_the_sampler_s_with_the_settings_of_its_request_alone(server):
    for settings in each(
        [{"temperature": 1.0, "seed": 3, **QUICK}, QUICK, {"plan": "food 2", "apart": False, **QUICK}]
    ):
        *passes, last = ask(server, "POST", "/answer", request("\x1b<b>" + PROMPT, **settings))[1]
        sampler = Sampler.load(MODELS["planned"], SampleConfig(decode="planned", **settings))
        (answer,) = sampler.answer(["\x1b<b>" + PROMPT])
        result, told = answer.result(), last["answer"]
        assert [text.strip() for text in texts(told)] == sum((round_["spans"] for round_ in result["rounds"]), [])
        assert told["prompt"] == "?<b>" + PROMPT and len(told["passes"]) == len(passes) == passes[-1]["passes"]
        assert [row[1:] for row in told["rows"]] == [
            [*x] for x in zip(answer.layout.prefix, answer.layout.begin, answer.layout.end)
        ]
        changed = [f"{name} {value}" for name, value in settings.items()]
        assert sorted(told["title"].split(" · ")) == sorted(["planned", *changed])


def test_the_knobs_of_a_way_are_the_settings_that_can_change_something_in_it():
    """`refuse_idle` says so: with some other settings it takes another value of each knob, and of nothing else."""
    others = {"order": "margin", "plan": "food 2", "constrained": False, "apart": False, "pads_last": False}

    def acts(field, method):
        for context in ({}, {"temperature": 1.0}, {"threshold": 0.4}):
            try:
                refuse_idle(
                    SampleConfig(**{**context, field.name: others.get(field.name, field.type(0.5) or 1)}), method
                )
                return True
            except ValueError:
                continue
        return False

    for name in each(name for name in METHODS if not METHODS[name].decodes):
        method = MethodConfig(method=name)
        offered = {knob["name"]: knob["help"] for knob in play.knobs(method)}
        acting = [f for f in fields(SampleConfig) if f.name != "decode" and acts(f, method)]
        assert offered == {f.name: f.metadata["help"] for f in acting}


def test_what_can_be_chosen_is_there(server):
    options = ask(server, "GET", "/options")[1][0]
    assert [*options["models"]["tasks/joint"]["ways"]] == ["planned", "parallel-ar"] and [*options["lessons"]] == [
        *LESSONS
    ]
    assert all(len(prompts) == len({*prompts}) == 12 for prompts in PROMPTS.values())
    for lesson in LESSONS.values():
        for model, way, settings in lesson["runs"]:
            assert {*settings} <= {knob["name"] for knob in options["models"][model]["ways"][way]}


def test_one_answer_at_a_time_others_wait_and_each_can_be_cancelled(server):
    slow = request(model="tasks/ar", decode="ar", max_tokens=4000, id="slow", temperature=100.0)
    first = asking(server, "POST", "/answer", slow).getresponse()
    assert json.loads(first.readline())["passes"]
    second = asking(server, "POST", "/answer", request(id="second", **QUICK)).getresponse()
    assert json.loads(second.readline()) == {"waiting": True}
    third = asking(server, "POST", "/answer", request(id="third", **QUICK)).getresponse()
    assert json.loads(third.readline()) == {"waiting": True}
    assert ask(server, "POST", "/answer", request(id="second"))[0] == 400, "this id is taken"
    ask(server, "POST", "/cancel", {"id": "third"})
    assert json.loads(third.read().splitlines()[-1]) == {"error": "Cancelled."}
    assert json.loads(first.readline())["passes"], "the others go on"
    ask(server, "POST", "/cancel", {"id": "slow"})
    assert json.loads(first.read().splitlines()[-1]) == {"error": "Cancelled."}
    assert "answer" in json.loads(second.read().splitlines()[-1])
    assert not server.cancelled and not server.turn.locked()


def test_a_page_that_goes_takes_its_answer_with_it(server, capfd):
    slow = request(model="tasks/ar", decode="ar", max_tokens=4000, id="gone", temperature=100.0)
    connection = asking(server, "POST", "/answer", slow)
    connection.getresponse().readline()
    connection.close()
    end = time.monotonic() + 60
    while server.cancelled or server.turn.locked():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_the_first_answer_takes_less_than_two_seconds_of_one_core():
    for name in each(["tasks/planned", "tasks/joint", "tasks/ar", "recipes/joint", "recipes/ar"]):
        model = play.Model(ROOT / f"checkpoints/{name}.safetensors")
        start = time.process_time()
        play.played(model, SampleConfig(), model.prompts[0], lambda answer: None)
        assert time.process_time() - start < 2


def test_the_command_takes_a_free_port_and_ends_quietly(server):
    command = [sys.executable, "demo/play.py", "--no-browser"]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    ports = [re.fullmatch(r"http://127.0.0.1:(\d+)/ \(Ctrl-C ends it\)\n", run.stdout.readline())[1] for run in runs]
    assert ports[0] != ports[1]
    for run in runs:
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=60) == ("\n", "") and run.returncode == 0
    with pytest.raises(ValueError, match="README.md is not a checkpoint of this project"):
        play.Model(ROOT / "README.md")


# ---------------------------------------------------------------- what a recording tells of each slot


def test_each_draw_tells_the_likeliest_tokens_and_none_unless_asked(tokenizer):
    for method in each(["planned", "parallel-ar", "ar", "block"]):
        answer = random_sampler(tokenizer, method).answer
        plain, frames = record(answer, SENTENCES[0]), record(answer, SENTENCES[0], likeliest=5)
        assert not any(draw.likeliest for frame in plain for draw in frame.draws)
        for draw in (draw for frame in frames for draw in frame.draws):
            probabilities = [p for _, p in draw.likeliest]
            assert probabilities == sorted(probabilities, reverse=True) and len(probabilities) <= 5
            assert draw.likeliest[0] == (draw.text, draw.probability), "at temperature 0 the likeliest is drawn"


def test_a_slot_that_waits_says_for_what(tokenizer, monkeypatch):
    """Compared with the two rules as their sentences say them, at what `fill` is given in each pass."""
    fill, expected = decode.fill, []

    def watched(logits, group, entry, quota, pad, config, generators):
        token, kept = fill(logits, group, entry, quota, pad, config, generators)
        sure = certainty(logits, token, config, generators) if config.order != "random" else None
        at = {(int(g), int(e)): n for n, (g, e) in enumerate(zip(group, entry))}
        for n, (g, e) in enumerate(zip(group.tolist(), entry.tolist())):
            beside = [at[g, e + d] for d in (-1, 1) if (g, e + d) in at and token[at[g, e + d]] == token[n] != pad]
            surer = sure is not None and any((sure[m], -m) > (sure[n], -n) for m in beside)
            run = [e]
            while (g, run[-1] - 1) in at:
                run.append(run[-1] - 1)
            late = token[n] == pad and any(token[at[g, x]] != pad for x in run)
            expected.append(
                "" if kept[n] else "neighbour" * (surer and config.apart) or "text" * (late and config.pads_last)
            )
        return token, kept

    def padded(logits, hidden, n=None):
        scores = logits(hidden, n)
        scores[::3, tokenizer.pad] += 9 * (n is not None)  # every third slot
        return scores

    monkeypatch.setattr(decode, "fill", watched)
    kinds = set()
    for method, settings in each([("planned", {}), ("dense", {"threshold": 0.01}), ("planned", {"apart": False}),
                                  ("planned", {"pads_last": False}), ("block", {"order": "random"})]):  # fmt: skip
        expected.clear()
        told = []
        for seed in range(4):
            sampler = random_sampler(tokenizer, method, seed, **settings)
            sampler.model.logits = partial(padded, sampler.model.logits)
            frames = record(sampler.answer, SENTENCES[0])
            told += [d.waits for before, f in zip([None, *frames], frames) for d in f.draws
                     if f.denoise_passes > (before.denoise_passes if before else 0)]  # fmt: skip
        assert told == expected
        kinds |= {*told}
    assert kinds == {"", "neighbour", "text"}


def test_the_row_of_a_token_is_what_it_saw_when_it_was_written(tokenizer):
    for method in each(["planned", "dense", "parallel-ar", "ar", "block"]):
        answers = []
        sampler = random_sampler(tokenizer, method)
        if method == "parallel-ar":  # then its finished spans see both ways
            sampler.method = MethodConfig(method=method, trained="joint")
        record(sampler.answer, SENTENCES[0], answers.append)
        table = rows(answers[-1])
        kinds = {part[0] for part, *_ in table if part}
        assert kinds >= {"prompt"} | ({"text"} if method == "ar" else {"slot", "span"})
        spans = [part[1:3] if part and part[0] in ("slot", "span") else None for part, *_ in table]  # round, span
        for n, (_, prefix, begin, end) in enumerate(table):
            first = next((m for m, span in enumerate(spans) if span and spans[n] and span[0] == spans[n][0]), None)
            for m in range(len(table)):
                own, sibling = spans[m] == spans[n], spans[m] and spans[n] and spans[m][0] == spans[n][0]
                inside = (own and (m <= n or method != "parallel-ar")) or method == "dense"
                expected = m <= n if not spans[n] else inside if sibling else m < first
                assert (m < prefix or begin <= m < end) == expected
