"""A page to play with: change the prompt, the plan and the settings, and watch the answer change.

    python demo/play.py

A server, for this machine alone, that runs the project's own sampler. The page is show/playground.html with its script;
in it the player of all recordings (show/player.html) plays the answers.
"""

import argparse
import json
import math
import re
import sys
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

from config import METHODS, MethodConfig, SampleConfig
from decode import Answer
from demo.lessons import LESSONS, PROMPTS
from methods import decoded_as, trained_by
from plumbing.device import find
from plumbing.files import UNREADABLE
from plumbing.settings import ROOT, Help, command, locate, printable, refuse_idle
from sample import Sampler
from show import page as player
from show.page import FOLDER, Race
from show.record import record, rows

PORT, LARGEST = 8000, 64 * 1024  # bytes of a request
SHIPPED = ("tasks/planned", "tasks/joint", "tasks/ar", "recipes/joint", "recipes/planned", "recipes/ar", "recipes/ar-drafts",
           "towns/planned", "towns/dense", "towns/named", "towns/ar")  # fmt: skip
SAFE = "default-src 'none'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'; "
INLINE = SAFE + "style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # as player.html itself says
OWN = SAFE + "style-src 'self'; script-src 'self'; connect-src 'self'; frame-src 'self'"
FILES = {
    "/": ("playground.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
ASKED = {  # path -> what a request says
    "/answer": {"id": str, "model": str, "decode": str, "prompt": str, "settings": dict},
    "/cancel": {"id": str},
}


# ---------------------------------------------------------------- models and their settings


class Model:
    """A checkpoint and the ways to decode it; it is loaded on first use. Raises ValueError if it is none."""

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        try:
            with safe_open(path, "pt") as file:
                info = json.loads(file.metadata()["info"])
        except UNREADABLE as error:
            raise ValueError(f"{path} is not a checkpoint of this project ({error})") from None
        known = info.get("trained_on") or {"data": "", "prompts": []}
        self.path, self.device, self.first = path, device, None
        self.trained = trained_by(info, str(path))
        self.data, self.prompts = known["data"], PROMPTS.get(known["data"], known["prompts"])

    def sampler(self, config: SampleConfig) -> Sampler:
        """Raises ValueError if it was not trained for `config.decode`, or if a setting would change nothing."""
        method = decoded_as(self.trained, config.decode)
        refuse_idle(config, method)
        self.first = self.first or Sampler.load(self.path, config, self.device)
        sampler = Sampler(self.first.model, self.first.tokenizer, config, method)
        sampler.passes = self.first.passes  # a GPU has recorded them
        return sampler

    def options(self) -> dict:
        ways = [decoded_as(self.trained, way) for way in METHODS[self.trained.method].decodes or [""]]
        return {"data": self.data, "prompts": self.prompts, "ways": {way.method: knobs(way) for way in ways}}


def knobs(method: MethodConfig) -> list[dict]:
    """The settings that act for a way to decode: always, above temperature 0, or with a threshold."""
    tried = [SampleConfig(), SampleConfig(temperature=1.0), SampleConfig(threshold=0.5)]
    asked = [f for f in fields(SampleConfig) if f.name != "decode"]
    return [
        {"name": f.name, "kind": f.type.__name__, "default": f.default, "among": f.metadata["among"],
         "help": f.metadata["help"], "limits": {w: x for w, x in f.metadata["limits"].items() if math.isfinite(x)}}
        for f in asked
        if any(all(acts.when(config, method) for acts in f.metadata["acts"]) for config in tried)
    ]  # fmt: skip


def configured(settings: dict, decode: str) -> SampleConfig:
    """The settings of a request. Raises ValueError for one that does not exist, or that is not of its type."""
    kinds = {f.name: f.type for f in fields(SampleConfig) if f.name != "decode"}
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    for key, value in settings.items():
        if key not in kinds:
            raise ValueError(f"there is no setting {key[:60]!r}")
        if type(value) is not kinds[key] and (kinds[key], type(value)) != (float, int):
            raise ValueError(f"{key}: expected {words[kinds[key]]}")
    return SampleConfig(decode=decode, **{key: kinds[key](value) for key, value in settings.items()})


def played(model: Model, config: SampleConfig, prompt: str, go_on: Callable[[Answer], None]) -> dict:
    """An answer as the page plays it (show/page.py), with `rows`, the mask of its tokens."""
    seen: list[Answer] = []

    def watch(answer: Answer) -> None:
        seen[:] = [answer]
        go_on(answer)

    sampler = model.sampler(config)
    method = sampler.method.method
    frames = record(sampler.answer, prompt, watch, likeliest=5)
    chosen = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("decode", "plan")}
    changed = [f"{key} {value}" for key, value in chosen.items() if value != getattr(SampleConfig, key)]
    way = model.path.stem + f" as {method}" * (method != model.trained.method)
    title = " · ".join([way, *[f"plan {shorten(config.plan, 60)}"] * bool(config.plan), *changed])
    (race,) = player.data([Race(prompt, [(title, method, frames)])])
    table = [(player.name(part), *ranges) for part, *ranges in rows(seen[0])]
    return race["answers"][0] | {"prompt": race["prompt"], "rows": table}


# ---------------------------------------------------------------- the server


class Cancelled(Exception):
    """Somebody wants no more of an answer."""


class Server(ThreadingHTTPServer):
    """Listens on this machine alone; computes one answer at a time. `models`: name -> Model."""

    def __init__(self, models: dict[str, Model], port: int = PORT):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError:  # the port is taken
            super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.turn, self.cancelled = models, threading.Lock(), {}
        self.hosts = [f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")]

    def options(self) -> dict:
        """All that the page can choose from."""
        lessons = {key: x for key, x in LESSONS.items() if all(model in self.models for model, *_ in x["runs"])}
        return {"models": {key: model.options() for key, model in self.models.items()}, "lessons": lessons}

    def handle_error(self, *args: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # that is a page that has gone
            super().handle_error(*args)


class Handler(BaseHTTPRequestHandler):
    """A request. What comes from another page, or under another name than this machine's, is refused."""

    timeout = 30  # seconds that it waits for a client

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, text: str, kind: str = "application/json", policy: str = SAFE, status: int = 200) -> None:
        """`text` as the whole body, or the beginning of one that goes on."""
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Security-Policy": policy, "Cache-Control": "no-store",
                   "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}  # fmt: skip
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def refuse(self, status: int, why: str) -> None:
        self.reply(json.dumps({"error": printable(why)}) + "\n", status=status)

    def do_GET(self) -> None:
        if self.headers["Host"] not in self.server.hosts:
            self.refuse(403, "This page is for this machine alone.")
        elif self.path in FILES:
            file, kind = FILES[self.path]
            self.reply((FOLDER / file).read_text(encoding="utf-8"), kind, OWN)
        elif self.path == "/player":
            self.reply(player.page([]), "text/html", INLINE)
        elif self.path == "/options":
            self.reply(json.dumps(self.server.options()))
        else:
            self.refuse(404, "There is no such page.")

    def do_POST(self) -> None:
        host, length = self.headers["Host"], self.headers["Content-Length"] or ""
        if host not in self.server.hosts or self.headers["Origin"] != f"http://{host}":
            return self.refuse(403, "Only this machine's own page may ask for answers.")
        if self.headers["Content-Type"] != "application/json":
            return self.refuse(400, "A request is JSON.")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > LARGEST:
            return self.refuse(400, f"A request has at most {LARGEST} bytes: shorten the prompt.")
        try:
            sent = json.loads(self.rfile.read(int(length)))
            if {key: type(value) for key, value in sent.items()} != ASKED[self.path]:
                raise TypeError
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return self.refuse(400, "This is no request of the page: load it again.")
        if self.path == "/answer":
            return self.answer(**sent)
        if event := self.server.cancelled.get(sent["id"]):
            event.set()
        self.reply("{}")

    def answer(self, id: str, model: str, decode: str, prompt: str, settings: dict) -> None:
        """Reply with lines of JSON: while it waits and works how far it is, and at the end `answer` or `error`."""
        try:
            if id in self.server.cancelled or model not in self.server.models:
                raise ValueError("This answer is on its way already, or its model is not here: load the page again.")
            config = configured(settings, decode)
        except (ValueError, OverflowError) as error:
            return self.refuse(400, str(error))
        self.server.cancelled[id] = threading.Event()
        try:
            self.reply("", "application/x-ndjson")
            while not self.server.turn.acquire(timeout=0.2):
                self.go_on(id, waiting=True)
            try:
                go_on = lambda answer: self.go_on(id, passes=answer.plan_passes + answer.denoise_passes)
                last = {"answer": played(self.server.models[model], config, prompt, go_on)}
            finally:
                self.server.turn.release()
        except (ValueError, Cancelled) as error:
            last = {"error": printable(str(error))}
        finally:
            del self.server.cancelled[id]
        self.line(**last)

    def go_on(self, id: str, **what: object) -> None:
        """Say how far an answer is. Raises Cancelled, or OSError if the page is gone."""
        if self.server.cancelled[id].is_set():
            raise Cancelled("Cancelled.")
        self.line(**what)

    def line(self, **what: object) -> None:
        self.wfile.write(json.dumps(what).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--checkpoint", action="append", default=[], metavar="FILE", help="one more model")
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    parser.add_argument("--device", default="auto", help="where to compute (default: %(default)s)")
    args = parser.parse_args()
    paths = {key: ROOT / f"checkpoints/{key}.safetensors" for key in SHIPPED}
    paths = {key: path for key, path in paths.items() if path.exists()} | {key: locate(key) for key in args.checkpoint}
    device = find(args.device)
    server = Server({key: Model(path, device) for key, path in paths.items()})
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        print(f"{url} (Ctrl-C ends it)", flush=True)
        if not args.no_browser:
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    command(main)
