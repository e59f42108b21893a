"""The settings: what each is, what it may be, and when it acts. The command lines and `--help` are made from them.

The model's are in model.py, beside what they shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from plumbing.device import CHOICES
from plumbing.settings import check, setting

ORDERS = ("entropy", "confidence", "margin", "random")  # which slots count as certain (unmask.py)
LONGEST = 4096  # positions of prompt and answer together: the dense mask of a prompt grows with its square


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    title: str  # for readers
    plan: str  # written by the model, none (plain text), or given (spans of a fixed size)
    attention: str = "sparse"  # how span tokens see spans (masks.ATTENTION)
    block: int = 0  # slots of a given span; 0: as many as the longest answer needs
    causal: float = 0.0  # share of training spans that are causal although the attention is sparse
    decodes: tuple[str, ...] = ()  # the methods that a model so trained can be sampled by; (): its own


METHODS = {  # methods.py says what they are
    "planned": Method("Planned diffusion", "written"),
    "dense": Method("Planned diffusion, dense", "written", "dense"),
    "parallel-ar": Method("Parallel autoregressive", "written", "causal"),
    "joint": Method("Joint", "written", causal=0.5, decodes=("planned", "parallel-ar")),
    "ar": Method("Autoregressive", "none"),
    "block": Method("Block diffusion", "given", block=32),
    "diffusion": Method("Diffusion of the whole answer", "given"),
}


class Acts(NamedTuple):
    """When a setting changes something; where it does not, it is refused, and `why` says why not."""

    when: Callable[[Any, "MethodConfig"], bool]  # of the settings that it belongs to, and of the method
    why: str  # {method} stands for the method's name


PLANNED = Acts(lambda c, m: m.plan == "written", "no plan is written with {method}")
GIVEN = Acts(lambda c, m: m.plan == "given", "there are no blocks with {method}")
STREAMS = Acts(lambda c, m: m.plan != "given", "nothing is written left to right with {method}")
NOISED = Acts(lambda c, m: m.plan != "none" and m.attention != "causal", "no span is denoised with {method}")
MANY = Acts(lambda c, m: m.rounds == "many", "with --rounds one an answer has no other rounds")
DRAFTED = Acts(lambda c, m: c.ahead > 0, "nothing is drafted without --ahead")
ADAPTED = Acts(lambda c, m: c.lora > 0, "there are no adapters without --lora")
WHOLE = Acts(lambda c, m: not c.lora, "adapters are trained by AdamW alone, without decay")
ORDERED = Acts(lambda c, m: not c.threshold, "with a threshold the order is that of confidence")
CONSTRAINED = Acts(lambda c, m: c.constrained, "the grammar follows a plan, and --no-constrained leaves it out")
DRAWN = Acts(lambda c, m: c.temperature > 0, "at temperature 0 the likeliest token is taken")


@dataclass(frozen=True)
class MethodConfig:
    """Method."""

    method: str = setting("planned", "what is learnt and sampled", among=METHODS)
    block: int = setting(0, "slots of a given span; 0: 32 for block, the longest training answer for diffusion",
                         at_least=0, at_most=4096, acts=[GIVEN])  # fmt: skip
    topics: str = setting("names", "what a plan calls its spans; numbers ('topic 1', 'topic 2') are an ablation",
                          among=("names", "numbers"), acts=[PLANNED])  # fmt: skip
    repeat_topic: bool = setting(True, "repeat the topic at the head of its span", acts=[PLANNED])
    rounds: str = setting("many", "rounds of an answer; one (ablation): what follows a <sync/> becomes one more span",
                          among=("many", "one"), acts=[PLANNED])  # fmt: skip
    trained: str = ""  # the method of the training; empty: this one

    def __post_init__(self) -> None:
        check(self)

    @property
    def plan(self) -> str:
        return METHODS[self.method].plan

    @property
    def attention(self) -> str:
        return METHODS[self.method].attention

    @property
    def in_training(self) -> "MethodConfig":
        """The method of the training: finished spans see themselves as they did there (masks.py)."""
        return replace(self, method=self.trained or self.method)

    @property
    def causal(self) -> float:
        """Share of the spans that train left to right."""
        return 1.0 if self.attention == "causal" else METHODS[self.method].causal


# ---------------------------------------------------------------- training


@dataclass
class TrainConfig:
    """Training."""

    data: str = setting("data/tasks", "folder of a data set, written by its prepare.py")
    out: str = setting("runs/tasks", "folder of checkpoint and log; an interrupted run in it is resumed")
    init: str = setting("", "what to start from: a checkpoint, such as an autoregressive model as warm-up, or the folder "
                            "of a pretrained model (docs/your-own-model.md)")  # fmt: skip
    new_only: int = setting(0, "first updates, which train the embeddings of tags and lengths alone", at_least=0)
    lora: int = setting(0, "rank of adapters that are trained in place of a pretrained model's weights; 0: no adapters",
                        at_least=0, at_most=1024)  # fmt: skip
    lora_alpha: float = setting(32.0, "adapters are scaled by lora_alpha / lora", above=0, acts=[ADAPTED])
    recompute: bool = setting(False, "gradient checkpointing: less memory for a third more time")
    steps: int = setting(10000, "updates", at_least=1)
    batch: int = setting(8, "sequences per micro-batch", at_least=1)
    accumulate: int = setting(1, "micro-batches per update, over all processes", at_least=1)
    weight: str = setting("uniform", "weight of a slot's loss, 1 or 1/t", among=("uniform", "elbo"), acts=[NOISED])
    t_min: float = setting(0.0, "lowest probability that slots are masked with: above 0 more are, but 1/t gives no ELBO",
                           at_least=0, below=1, acts=[NOISED])  # fmt: skip
    history: str = setting("clean", "rounds before the one trained; noised is an ablation", among=("clean", "noised"),
                           acts=[PLANNED, NOISED, MANY])  # fmt: skip
    even_rounds: bool = setting(False, "pick every round of an answer as often, rather than in proportion to what it "
                                       "predicts: helps where a short round is hard", acts=[PLANNED, MANY])  # fmt: skip
    extra_pads: int = setting(0, "ablation (10 in the authors' code): a training span is its text and 0 to this "
                                 "many [PAD], drawn once per span; 0: it has its planned length",
                              at_least=0, at_most=1000, acts=[PLANNED])  # fmt: skip
    span_weight: float = setting(1.0, "weight of the loss of spans beside that of the plan", at_least=0, acts=[PLANNED])
    ahead: int = setting(0, "tokens that the model learns to draft ahead; 0: none", at_least=0, at_most=64,
                         acts=[STREAMS])  # fmt: skip
    draft_weight: float = setting(0.3, "weight of the loss of drafts beside that of the plan", at_least=0,
                                  acts=[DRAFTED])  # fmt: skip
    lr: float = setting(0.005, "peak learning rate of Muon (matrices)", at_least=0, acts=[WHOLE])
    adam_lr: float = setting(0.003, "peak learning rate of AdamW (embedding, norms and adapters)", at_least=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices and embedding", at_least=0, acts=[WHOLE])
    warmup: int = setting(100, "updates of linear warm-up, at most half of all", at_least=0)
    decay: float = setting(1.0, "share of the updates after the warm-up, the last ones, in which the rates fall linearly "
                                "to 0; before they are constant", above=0, at_most=1)  # fmt: skip
    device: str = setting("auto", f"where to train: {', '.join(CHOICES)}")
    attention: str = setting("auto", "what computes attention: auto, dense, flex or kernel (kernels/backends.py)")
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    compile: bool = setting(False, "torch.compile: faster after a minute, in which Ctrl-C waits; needs a C++ compiler")
    seed: int = setting(0, "seed of initial weights, order, rounds and noise", at_least=0, below=2**63)
    train_on: int = setting(0, "training examples used, the first of the split; 0: all", at_least=0)
    validate_every: int = setting(1000, "updates between validations and checkpoints", at_least=1)
    validate_on: int = setting(128, "validation examples used during training", at_least=1)
    log_every: int = setting(50, "updates between lines of the log", at_least=1)

    def __post_init__(self) -> None:
        check(self)


# ---------------------------------------------------------------- sampling


@dataclass
class SampleConfig:
    """Sampling."""

    decode: str = setting(
        "", "method to decode by, of those that the model was trained for; default: the first of them"
    )
    steps_ratio: float = setting(0.0, "most passes in which a round is denoised, as a share of its longest span's slots: 0.25 "
                                      "fills about four slots of it per pass; 0: 0.5, or with a threshold no limit", at_least=0, at_most=1,
                                 acts=[NOISED])  # fmt: skip
    threshold: float = setting(0.0, "if above 0: a pass also fills every slot whose likeliest token has this probability or more",
                               at_least=0, at_most=1, acts=[NOISED])  # fmt: skip
    order: str = setting("entropy", "which slots count as certain and are filled first (a threshold takes confidence)",
                         among=ORDERS, acts=[NOISED, ORDERED])  # fmt: skip
    apart: bool = setting(True, "of two neighbouring slots that would get the same token in a pass, fill only one",
                          acts=[NOISED])  # fmt: skip
    pads_last: bool = setting(True, "leave a slot for a later pass if it would get [PAD] while a masked one right before "
                                    "it would get text", acts=[NOISED])  # fmt: skip
    plan: str = setting("", 'plan of the first round, such as "habitat 1; food 2"; after it the model goes on by itself',
                        acts=[PLANNED, CONSTRAINED])  # fmt: skip
    length_scale: float = setting(1.0, "scales every planned length", above=0, at_most=100, acts=[PLANNED])
    temperature: float = setting(0.0, "0 takes the likeliest token; else 0.01 or more", at_least=0, at_most=100)
    top_p: float = setting(1.0, "draw from the likeliest tokens that have this probability together",
                           above=0, at_most=1, acts=[DRAWN])  # fmt: skip
    constrained: bool = setting(True, "take only tokens that make a valid plan; without it an answer whose plan is not one ends there, broken",
                                acts=[STREAMS])  # fmt: skip
    ahead: int = setting(0, "tokens drafted ahead in plan, text and causal spans, then checked", at_least=0, at_most=64,
                         acts=[STREAMS])  # fmt: skip
    max_tokens: int = setting(512, "most positions of an answer: plan, text and spans with their tags",
                              at_least=1, at_most=LONGEST)  # fmt: skip
    seed: int = setting(0, "seed; the i-th prompt answered uses seed + i", at_least=0, at_most=2**53)

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.temperature < 0.01:
            raise ValueError(f"--temperature {self.temperature}: expected 0, or 0.01 or more")
