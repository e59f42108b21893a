"""The paper, claim by claim: train what its page needs, measure it, and write docs/paper.md and its pictures.

    python measure/paper.py                       # about six hours of one CPU core; resumes; draws what is measured
    python measure/paper.py --only topics sync    # these claims, without the page
    python measure/paper.py --preset minutes      # few updates, one seed: shows how it works, and no answer is right

Trainings and figures are kept under a hash of code, data and settings: trainings in runs/paper, figures in
docs/paper.json. What has not changed is not done again. Two calls with other claims may run side by side.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

from measure import beyond, claims, variants
from measure.claims import Claim, Found
from measure.drawings import PICTURES
from measure.models import MODELS, RECIPES, TOWNS, VARIANTS
from measure.pictures import save
from measure.study import Model, Study
from plumbing.device import find
from plumbing.files import write_whole
from plumbing.settings import ROOT, Help, command

CLAIMS: dict[str, Callable[[Found], Claim]] = {
    "frontier": claims.frontier, "training": claims.training, "times": claims.times, "topics": claims.topics,
    "sync": claims.sync, "lengths": claims.lengths, "knobs": claims.knobs, "plans": claims.plans,
    "rivals": beyond.rivals, "parts": beyond.parts, "independence": beyond.independence, "given": beyond.given,
}  # fmt: skip
LIMIT = {RECIPES: 64}  # test prompts; of towns all 300
MINUTES = ("topics", "sync")  # the claims of that preset
HEAD = """# The paper, claim by claim

    python measure/paper.py

wrote this page from what it trained and measured on a CPU: models of 0.4M parameters on the invented towns of
[data/towns](../data/towns), models of 0.7M on real recipes, each with seeds {seeds}. A figure is their mean; in brackets are
the lowest and the highest. The paper's are those of its second version (March 2026; 7B model, AlpacaEval, 805 prompts),
taken second hand from reading notes; its first version calls the sparse variant planned diffusion. "Agrees" means that
the direction is the same here, never the size: nothing on this page says how the method does at 7B parameters.
Three seeds that do not overlap happen by chance once in twenty comparisons; 200 prompts of towns leave 2 to 3 points of
sampling error, 64 recipes about 2 of chrF. Only planned methods were tuned (`--even_rounds`). The towns were made so
that a span needs its topic, and the second round of `sums` the first.

The [shipped models](results.md) are larger and trained longer, and show the other side. On recipes the joint model,
distilled and with drafts, has chrF 56.3 in 28 passes (19,228 updates), autoregression 53.9 in 205 (1,200), with drafts
55.3 in 92 (2,574). But its parts agree less: of the ingredients in the steps 76% are in the list (autoregression 84, real
recipes 96). On tasks planned diffusion has all facts, lookups and transforms right in a tenth of the passes after 3,000
updates; after a third of them three seeds had 54 to 86%, autoregression 98 to 100.
"""


def shortened(model: Model) -> Model:
    """A training with a twentieth of its updates."""
    return replace(model, train=re.sub(r"--steps (\d+)", lambda m: f"--steps {max(5, int(m[1]) // 20)}", model.train))


def prepare(folder: str) -> None:
    """Write a data set unless it is there. Raises ValueError if that fails."""
    if not (ROOT / folder / "train.jsonl").exists():
        if subprocess.run([sys.executable, ROOT / folder / "prepare.py"]).returncode:
            raise ValueError(f"{folder} cannot be prepared, see above")


def judged(claim: Claim, seeds: list[int]) -> Claim:
    """The claim; from fewer than three seeds nothing is told."""
    few = len(seeds) < 3 and claim.verdict.startswith(("**agrees", "**differs"))
    return replace(claim, verdict=f"**cannot** be told from so few seeds ({len(seeds)})") if few else claim


def page(found: dict[str, Claim], seeds: list[int]) -> str:
    """The page: a table of all claims, then each with what was measured."""
    few = "\n**Fewer than three seeds: leads, not results.**\n" if len(seeds) < 3 else ""
    lines = [HEAD.format(seeds=", ".join(map(str, seeds))) + few, "| claim | the paper | here | |", "|---|---|---|---|"]
    lines += [f"| [{c.title}](#{name}) | {c.paper} | {c.here} | {c.verdict} |" for name, c in found.items()]
    for name, claim in found.items():
        lines += [
            "",
            f'## <a id="{name}"></a>{claim.title}',
            "",
            *claim.lines,
            *(f"\n![{claim.title}]({p})" for p in claim.pictures),
        ]
    return "\n".join(lines) + "\n"


def draw(found: Found, names: list[str], folder: Path) -> None:
    """Write the pictures of some claims. Without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: pip install -r requirements-extra.txt")
        return
    for name in names:
        function, size = PICTURES[name]
        figure = Figure(figsize=size, layout="tight")
        function(found, figure)
        save(figure, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=[], metavar="CLAIM",
                        help="claims to measure: %(choices)s (default: all)")  # fmt: skip
    parser.add_argument("--preset", choices=("full", "minutes"), default="full", help="(default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every training (default: 0 1 2)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/paper"), help="folder of trainings (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="where to train and measure (default: %(default)s)")
    args = parser.parse_args()
    find(args.device)  # before anything takes its time
    if min(args.seeds) < 0 or len({*args.seeds}) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: expected different whole numbers")
    full = args.preset == "full"
    names = args.only or (list(CLAIMS) if full else list(MINUTES))
    for folder in (TOWNS, RECIPES) if full else (TOWNS,):
        prepare(folder)
    for variant in (variants.untagged, variants.coupled, variants.named, variants.skeleton):
        variants.write_variant(TOWNS, Path(VARIANTS) / variant.__name__, variant)
    models = MODELS if full else {name: shortened(model) for name, model in MODELS.items()}
    folder = ROOT / "docs" if full else args.out
    study = Study(models, args.out, folder / "paper.json", LIMIT if full else {RECIPES: 2, "": 6}, args.device)
    found = Found(study, args.seeds if full else args.seeds[:1])
    done = {}
    for name in names:
        done[name] = judged(CLAIMS[name](found), found.seeds)
        print(f"{name}: {done[name].here}. {done[name].verdict}", flush=True)
    draw(found, [picture for claim in done.values() for picture in claim.pictures], folder)
    if not args.only:
        write_whole(folder / "paper.md", page(done, found.seeds))
        print(f"wrote {folder / 'paper.md'}")


if __name__ == "__main__":
    command(main)
