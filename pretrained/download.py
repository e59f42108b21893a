"""Fetch a pretrained model from the Hugging Face hub: config.json, tokenizer.json and safetensors, nothing else.

    python pretrained/download.py HuggingFaceTB/SmolLM2-135M --out models/SmolLM2-135M

The same command again goes on with the files that are missing. HF_ENDPOINT names another server, and HF_TOKEN is sent
for models whose licence has to be accepted first.
"""

import argparse
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.files import atomic
from plumbing.settings import command

HUB = "https://huggingface.co"


def fetch(name: str, file: str, folder: Path) -> bool:
    """Download a file of a model unless it is there. Returns whether the hub has it. Raises ValueError or OSError."""
    if (folder / file).exists():
        return True
    request = urllib.request.Request(f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{name}/resolve/main/{file}")
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # for the hub, not where it redirects to
    try:
        with urllib.request.urlopen(request, timeout=60) as answer, atomic(folder / file) as temporary:
            print(f"{file}: {int(answer.headers.get('Content-Length') or 0) / 1e6:,.1f} MB", flush=True)
            with temporary.open("wb") as out:
                shutil.copyfileobj(answer, out, 1 << 20)
            if temporary.stat().st_size != int(answer.headers.get("Content-Length") or temporary.stat().st_size):
                raise ValueError(f"{file} broke off: give the same command again")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ValueError(f"{request.full_url}: {error}: there is no such model, or its licence has to be accepted on "
                             "the hub first; then set HF_TOKEN") from None  # fmt: skip
        if error.code != 404:
            raise ValueError(f"{request.full_url}: {error}") from None
        return False
    except (urllib.error.URLError, TimeoutError) as error:
        raise ValueError(f"{request.full_url} cannot be reached ({error}): on a machine with a network give the same command "
                         f"(or `hf download {name}`), and copy the folder here") from None  # fmt: skip
    return True


def download(name: str, folder: Path) -> None:
    """All files that `train.py --init` reads. Raises ValueError if the hub lacks one."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name}: expected owner/model, as in the model's address on the hub")
    for file in ("config.json", "tokenizer.json"):
        if not fetch(name, file, folder):
            raise ValueError(f"{name} has no {file} on the hub: take a model with config.json, tokenizer.json and "
                             "safetensors")  # fmt: skip
    index = "model.safetensors.index.json"
    files = ["model.safetensors"]
    if fetch(name, index, folder):
        files = sorted({Path(file).name for file in json.loads((folder / index).read_text())["weight_map"].values()})
    for file in files:
        if not fetch(name, file, folder):
            raise ValueError(f"{name} has no {file} on the hub: take a model with safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="owner/model on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    download(args.name, args.out)
    print(f"python train.py --init {args.out} ... (docs/your-own-model.md)")


if __name__ == "__main__":
    command(main)
