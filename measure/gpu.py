"""Try all that runs on a GPU, with one command, in eight minutes: tests, training, sampling, and how fast they are.

    python measure/gpu.py                                  # writes runs/gpu/report.md and report.json
    python measure/gpu.py --only versions build kernel     # the parts that have such a word in their name
    python measure/gpu.py --device cpu                     # a rehearsal: all parts, small, the kernel emulated

Each part is a process of its own with a limit of time. One that fails or hangs ends there, and the next begins; the
report says what failed, and is written anew after each part. What no longer fits into --minutes is left out.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

from plumbing.settings import ROOT, Help, command  # no more than that: the machine may lack all packages


class Part(NamedTuple):
    name: str
    seconds: int  # that it may take
    command: str
    small: str = ""  # options that make it small for a rehearsal


TRY, SIZE = "measure/gpu_parts.py {device} {data} {checkpoints} {out}", "--batch 1 2 --prompts 2 --max_tokens 24"
TRAIN = ("train.py --device {device} --data {data} --init {checkpoints}/ar.safetensors --steps 300 --warmup 20 "
         "--validate_every 100 --validate_on 32 --log_every 10 --train_on 4000 --out {out}/trainings/whole")  # fmt: skip
FEW = ("--init '' --n_layer 1 --d_model 32 --n_head 1 --n_kv_head 1 --d_ff 32 --steps 6 --warmup 2 "
       "--validate_every 3 --validate_on 2 --log_every 1 --batch 2 --train_on 8")  # fmt: skip
TESTS = "-m pytest -q tests/more/test_kernels_faults.py tests/more/test_graphs.py -k on_a_gpu"
BENCH = "measure/bench.py --json --device {device} --data {data} --preset gpu --updates 10 --repeats 3 --part training"
KERNEL, HEADS = "kernels/bench.py --json --device {device} --repeats 10 --part", "--heads 2 --kv-heads 1 --head-size 32"
PARTS = (
    Part("versions", 60, f"{TRY} versions"),
    Part("data", 90, f"{TRY} prepared"),
    Part("build of the kernel", 90, f"{TRY} built"),
    Part("tests of the kernel", 60, TESTS),
    Part("training", 60, TRAIN, FEW),
    Part("training, stopped and resumed", 90, f"{TRY} resumed"),
    Part("sampling: ar", 60, f"{TRY} sampled --model ar", SIZE),
    Part("sampling: planned", 90, f"{TRY} sampled --model planned", SIZE),
    Part("sampling: joint", 60, f"{TRY} sampled --model joint", SIZE),
    Part("sampling: trained", 30, f"{TRY} sampled --model trained", SIZE),
    Part("kernel beside others: training", 80, f"{KERNEL} training --lengths 1024 8192",
         f"{HEADS} --lengths 64 --tokens 64 --repeats 2"),
    Part("kernel beside others: sampling", 60, f"{KERNEL} sampling --sampling 64:512 64:2048 256:8192",
         f"{HEADS} --sampling 16:64 --repeats 2"),
    Part("torch.compile", 90, f"{BENCH} --compile --methods planned", "--preset tiny --updates 1 --repeats 2"),
    Part("paper page", 180, "measure/paper.py --preset minutes --device {device} --out {out}/trainings/paper", "--help"),
    Part("speed of training", 45, BENCH, "--preset tiny --updates 1 --repeats 2 --methods ar planned"),
)  # fmt: skip


# ---------------------------------------------------------------- parts


def command_of(part: Part, args: argparse.Namespace) -> list[str]:
    """What is run; on a CPU scripts are told that it is a GPU."""
    given = vars(args) | {"out": os.path.relpath(args.out, ROOT)}
    words = shlex.split(part.command.format(**{name: shlex.quote(str(value)) for name, value in given.items()}))
    if args.device != "cpu":
        return [sys.executable, *words]
    script = words if words[0] == "-m" else ["kernels/emulated.py", *words]
    return [sys.executable, *script, *shlex.split(part.small)]


def run(words: list[str], log: Path, seconds: float) -> str:
    """Run a part, with what it says in a log. Returns how it ended."""
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return "failed" if process.wait(seconds) else "ok"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.wait()


def rows_of(log: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The JSON objects that a part has printed, one per line, and its last other lines."""
    rows, said = [], []
    for line in log.read_text(errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        rows, said = (rows + [row], said) if isinstance(row, dict) else (rows, said + [line] if line.strip() else said)
    return rows, said[-12:]


def tried(part: Part, args: argparse.Namespace, left: float) -> dict[str, Any]:
    """What became of a part, for the report; `left`: seconds until all has to end."""
    words, start, log = command_of(part, args), time.monotonic(), args.out / "logs" / f"{part.name}.txt"
    found = {"part": part.name, "command": shlex.join(["python", *words[1:]]), "rows": [], "said": []}
    if left < part.seconds / 2:
        return found | {"state": f"left out: {max(left, 0):.0f} s were left", "seconds": 0}
    state = run(words, log, min(part.seconds, left))
    rows, said = rows_of(log)
    if state == "ok" and any("failed" in row for row in rows):
        state = "failed"
    return found | {"state": state, "seconds": round(time.monotonic() - start, 1), "rows": rows, "said": said}


# ---------------------------------------------------------------- the report


def cells(part: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table: the part, how it ended, seconds, what was tried, and what came of it."""
    lines = []
    for row in part["rows"]:
        figures = ", ".join(f"{name} {value}" for name, value in row.items() if name != "what")
        lines.append([row.get("what", ""), f"**{figures}**" if "failed" in row else figures])
    lines = lines or [["", part["said"][-1].strip() if part["said"] else ""]]
    state = part["state"] if part["state"] == "ok" else f"**{part['state']}**"
    heads = [[part["part"], state, f"{part['seconds']:.0f}"], *[["", "", ""]] * (len(lines) - 1)]
    return [(*head, *line) for head, line in zip(heads, lines)]


def write(report: dict[str, Any], out: Path) -> None:
    """Both files of the report, as far as it is."""
    lines = [f"# {report['device']}, {report['date']}", "", f"`{report['command']}`, {report['seconds']:.0f} s.", ""]
    if report["device"] == "cpu":
        lines += ["A rehearsal: answers are cut short and the kernel is emulated, so no figure means anything.", ""]
    lines += ["| part | ended | seconds | what | figures |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for p in report["parts"] for row in cells(p)]
    for part in report["parts"]:
        if part["state"] != "ok":
            said = [line.rstrip() for line in part["said"]]
            lines += ["", f"**{part['part']}**: {part['state']}", "", *(f"    {s}" for s in (part["command"], *said))]
    for name, text in (("report.md", "\n".join(lines) + "\n"), ("report.json", json.dumps(report, indent=1) + "\n")):
        (out / f"{name}.part").write_text(text, encoding="utf-8")
        os.replace(out / f"{name}.part", out / name)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="that all may take (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="parts that have one in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the report (default: runs/gpu)")
    parser.add_argument("--data", default="data/tasks", help="data set, prepared if need be (default: %(default)s)")
    parser.add_argument("--checkpoints", default="checkpoints/tasks", help="its models (default: %(default)s)")
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


def main() -> None:
    args, start = options(), time.monotonic()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # whoever ends this ends the part that runs, as Ctrl-C does
    for folder in ("logs", "trainings"):  # of an earlier call
        shutil.rmtree(args.out / folder, ignore_errors=True)
    (args.out / "logs").mkdir(parents=True)
    report = {"device": "unknown device", "date": time.strftime("%d %B %Y, %H:%M"), "seconds": 0.0, "parts": [],
              "command": shlex.join(["python", *sys.argv])}  # fmt: skip
    for part in PARTS:
        if not any(word in part.name for word in args.only):
            continue
        left = 60 * args.minutes - (time.monotonic() - start)
        print(f"{60 * args.minutes - left:4.0f} s  {part.name} ...", end=" ", flush=True)
        found = tried(part, args, left)
        print(found["state"], flush=True)
        report["parts"].append(found)
        report["device"] = next((row["device"] for row in found["rows"] if "device" in row), report["device"])
        report["seconds"] = time.monotonic() - start
        write(report, args.out)
        if part.name == "versions" and not any("device" in row for row in found["rows"]):
            print("there is nothing to compute on: all else is left out")
            break
    print(f"see {args.out / 'report.md'}")
    sys.exit(any(part["state"] != "ok" for part in report["parts"]))


if __name__ == "__main__":
    command(main)
