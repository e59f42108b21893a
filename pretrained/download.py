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
import ssl
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.files import UNREADABLE, atomic
from plumbing.settings import Help, command
from pretrained.llama import tensor_files

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
            size = getattr(answer, "length", None)  # None: the server does not say
            print(f"{file}: {f'{size / 1e6:,.1f} MB' if size else 'of unknown size'}", flush=True)
            with temporary.open("wb") as out:
                shutil.copyfileobj(answer, out, 1 << 20)
            if not is_whole(temporary, file, size):
                raise ValueError(f"{request.full_url} broke off, or is something else: give the same command again")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ValueError(f"{request.full_url}: {error}: there is no such model, or its licence has to be accepted on "
                             "the hub first; then set HF_TOKEN") from None  # fmt: skip
        if error.code != 404:
            raise ValueError(f"{request.full_url}: {error}") from None
        return False
    except (HTTPException, urllib.error.URLError, ssl.SSLError, TimeoutError, ConnectionError) as error:
        raise ValueError(f"{request.full_url} cannot be reached, or broke off ({str(error)[:200]!r}): give the same command "
                         f"again, or on a machine with a network (or `hf download {name}`), and copy the folder here"
                         ) from None  # fmt: skip
    return True


def is_whole(path: Path, file: str, size: int | None) -> bool:
    """Whether a download has its size, where that is known, and is JSON or safetensors to its end."""
    try:
        if file.endswith(".json"):
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, "pt"):
                pass
    except UNREADABLE:
        return False
    return size in (None, path.stat().st_size)


def download(name: str, folder: Path) -> None:
    """All files that `train.py --init` reads. Raises ValueError if the hub lacks one, or sends something else."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name}: expected owner/model, as in the model's address on the hub")
    for file in ("config.json", "tokenizer.json"):
        if not fetch(name, file, folder):
            raise ValueError(f"{name} has no {file} on the hub: take a model with config.json, tokenizer.json and "
                             "safetensors")  # fmt: skip
    index = "model.safetensors.index.json"
    files = ["model.safetensors"]
    if fetch(name, index, folder):
        files = sorted({path.name for path in tensor_files(folder).values()})
    for file in files:
        if not fetch(name, file, folder):
            raise ValueError(f"{name} has no {file} on the hub: take a model with safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("name", help="owner/model on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    download(args.name, args.out)
    print(f"python train.py --init {args.out} ... (docs/your-own-model.md)")


if __name__ == "__main__":
    command(main)
