"""The trainings of the page on the paper: every model that measure/paper.py compares, and what it starts from."""

from measure.study import Model

TOWNS, RECIPES, VARIANTS = "data/towns", "data/recipes", "runs/paper/data"
RATES = "--lr 0.005 --adam_lr 0.003 --warmup 100 --decay 1 --clip 1"
SMALL = f"--batch 8 {RATES} --d_model 96 --n_head 4 --n_kv_head 4 --d_ff 256 --n_layer 3"
HALF = f"--batch 8 {RATES} --d_model 72 --n_head 4 --n_kv_head 4 --d_ff 192 --n_layer 2"
LARGER = f"--batch 8 {RATES} --d_model 96 --n_head 4 --n_kv_head 4 --d_ff 288 --n_layer 4"
STEPS, FIRST, WARM_UP = 1500, 300, "warm-up"  # all towns models but two begin with the same autoregressive updates
EVEN = "--even_rounds"  # as many updates for the short second round as for the first


def towns(train: str, data: str = TOWNS, steps: int = STEPS) -> Model:
    return Model(data, f"{SMALL} {train} --steps {steps}", WARM_UP)


METHODS = {
    WARM_UP: Model(TOWNS, f"{SMALL} --method ar --steps {FIRST}"),
    "planned": towns(f"--method planned {EVEN}"),
    "ar": towns("--method ar"),
    "parallel-ar": towns(f"--method parallel-ar {EVEN}"),
    "dense": towns(f"--method dense {EVEN}"),
    "joint": towns(f"--method joint {EVEN} --ahead 8"),
    "ar drafts": towns("--method ar --ahead 8"),
    "ar half": Model(TOWNS, f"{HALF} --method ar --steps {STEPS + FIRST}"),
    "skeleton": towns("--method ar", f"{VARIANTS}/skeleton", steps=2 * STEPS),  # its requests are shorter
    "block": towns("--method block --block 20"),
    "diffusion": towns("--method diffusion"),
}
ABLATIONS = {
    "numbered topics": towns(f"--method planned {EVEN} --topics numbers"),
    "topic not repeated": towns(f"--method planned {EVEN} --no-repeat_topic"),
    "one round": towns("--method planned --rounds one"),
    "untagged": towns(f"--method planned {EVEN}", f"{VARIANTS}/untagged"),
    "extra pads": towns(f"--method planned {EVEN} --extra_pads 10"),
    "noised history": towns(f"--method planned {EVEN} --history noised"),
    "1/t weights": towns(f"--method planned {EVEN} --weight elbo"),
    "rounds in proportion": towns("--method planned"),
    "no warm-up": Model(TOWNS, f"{SMALL} --method planned {EVEN} --steps {STEPS + FIRST}"),
}


def coupled(train: str, start: str, steps: int = 1000, data: str = "coupled") -> Model:
    return Model(f"{VARIANTS}/{data}", f"{SMALL} {train} --steps {steps}", start)


COUPLED = {  # none of the others has learnt to agree; dense spans learn it late, since few noisings show a sibling's colour
    "coupled ar": coupled("--method ar", "ar"),
    "coupled parallel-ar": coupled("--method parallel-ar", "parallel-ar"),
    "coupled planned": coupled("--method planned", "coupled ar", 4000),
    "coupled dense": coupled("--method dense", "coupled ar", 4000),
    "coupled named": coupled("--method planned", "coupled ar", 4000, data="named"),
}
EPOCHS, TEXTS = (2, 4, 8, 16), 400  # of the study of epochs, and training recipes


def epochs(method: str, n: int) -> Model:
    return Model(RECIPES, f"{LARGER} --method {method} --train_on {TEXTS} --steps {n * TEXTS // 8}")


STUDIED = ("ar", "planned", "dense", "diffusion", "joint")
OVER_EPOCHS = {f"{method} {n} epochs": epochs(method, n) for method in STUDIED for n in EPOCHS}
MODELS = METHODS | ABLATIONS | COUPLED | OVER_EPOCHS
