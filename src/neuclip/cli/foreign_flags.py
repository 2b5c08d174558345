"""Flags of other trainers that stand for no setting here. Imports no torch.

`read_words` goes over a command line before it is parsed. It takes out the flags that change
nothing, with a note for each, and refuses the flags of features that are out of scope by name. It
also refuses two spellings of one flag with different values, of which a parser would take the last.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from neuclip.errors import UserError


@dataclass(frozen=True)
class Accepted:
    """A flag that is accepted and changes nothing.

    Attributes:
        note: what happens here instead.
        takes_value: whether a value follows.
        only: values that may be given; empty: any.
    """

    note: str
    takes_value: bool = False
    only: tuple[str, ...] = ()


_EXACT = "no effect: the gradient over the global batch is always exact"

ACCEPTED: Mapping[str, Accepted] = {
    "local-loss": Accepted(_EXACT),
    "gather-with-grad": Accepted(_EXACT),
    "save-most-recent": Accepted("no effect: epoch_latest.pt is always the newest checkpoint"),
    "dataset-resampled": Accepted(
        "no effect: samples are drawn without replacement; --train-num-samples sets the length of "
        "an epoch, --train-data-upsampling-factors the visits of each source"
    ),
    "val-num-samples": Accepted("no effect: the samples of --val-data are counted", True),
    "ddp-static-graph": Accepted("no effect: DDP does not assume a static graph"),
    "dist-url": Accepted("no effect: torchrun or srun sets MASTER_ADDR and MASTER_PORT", True),
    "dist-backend": Accepted("no effect: nccl on GPUs, gloo on CPUs", True),
    "no-set-device-rank": Accepted(
        "no effect: under srun a process takes the only GPU that it sees; otherwise all GPUs of a "
        "machine must be visible to its processes"
    ),
    "loss-dist-impl": Accepted("no effect: each loss has one exact exchange", True),
    "log-local": Accepted("no effect: the main process writes the log"),
    "log-metric-every-n-steps": Accepted("no effect: see --log-every-n-steps", True),
    "train-loss-ema-samples": Accepted("no effect: the loss of the step is shown", True),
    "debug": Accepted("no effect: the log has one level"),
    "copy-codebase": Accepted("no effect: the code is not copied; install a fixed version"),
    "fsdp-checkpoint": Accepted("no effect: a checkpoint of --fsdp is always sharded", True),
    "val-retrieval-chunk-size": Accepted("no effect: retrieval always runs in chunks", True),
    "val-retrieval-precision": Accepted("no effect: retrieval ranks in float32", True),
    "torchcompile-strategy": Accepted("no effect: --torchcompile compiles each block", True),
    "torchcompile-mode": Accepted("no effect: --torchcompile uses the default mode", True),
    "remote-sync": Accepted(
        "nothing is copied there: copy the run folder yourself, for example with `aws s3 sync` in "
        "a second process",
        True,
    ),
    "remote-sync-frequency": Accepted("no effect: see --remote-sync", True),
    "remote-sync-protocol": Accepted("no effect: see --remote-sync", True),
    "lambda-tolerance": Accepted(
        "no effect: it can only stop the networks' steps from the sixth on; all are run", True
    ),
    "lambda-eps": Accepted("no effect: normalizers are logarithms here", True, ("0", "0.", "0.0")),
    "update-lambda-every-n-steps": Accepted("the only interval here", True, ("1",)),
    "glofnd": Accepted("no effect: --glofnd-alpha above 0 selects it", True, ("glofnd",)),
    "glofnd-start-lda": Accepted(
        "no effect: thresholds are used as soon as they are learned (--glofnd-start-update)", True
    ),
    "glofnd-reset-lda": Accepted("no effect: thresholds start at 1, a resumed run keeps its own"),
    "glofnd-clip-grad-mult": Accepted(
        "no effect: gradients of thresholds are not clipped", True, ("0", "0.", "0.0")
    ),
    "glofnd-u-warmup": Accepted("no effect: moving averages go on", True, ("0",)),
    "note": Accepted("no effect", True),
}

_AUDIO = "audio: neuclip trains on images and captions"
_COCA = "CoCa: neuclip trains the two encoders of CLIP and has no text decoder"
_NAFLEX = "NaFlex (images of several sizes, texts of several lengths): inputs have one size here"
_REFERENCE = (
    "a reference model (DRRho-CLIP): the objective without one is FastCLIP's "
    "(--fastclip --multiply_tau --temperature_scheme global_learnable)"
)
_AMORLIP = "this variant of AmorLIP: neuclip has the one of its README"
_DATACOMP = (
    "DataComp's train.py: give what it passes on, --train-data DIR/shards --logs DIR --name NAME "
    "and the scale. small: --model ViT-B-32 --lr 5e-4 --warmup 500 --epochs 5 --train-num-samples "
    "2560000, and 4096 pairs per step (--batch-size x --accum-freq x GPUs); medium: the same with "
    "--train-num-samples 25600000"
)
_REMOVED = "TorchScript and Horovod, which open_clip removed: start with torchrun or srun"
_OFFLOAD = "FSDP's further modes: --fsdp shards parameters, gradients and optimizer"

OUT_OF_SCOPE: Mapping[str, str] = {
    **dict.fromkeys(("coca-caption-loss-weight", "coca-contrastive-loss-weight"), _COCA),
    "pretrained-audio": _AUDIO,
    "use-naflex": _NAFLEX,
    "force-naflex-vision": _NAFLEX,
    "length-bucketing": _NAFLEX,
    "text-pad-multiple": _NAFLEX,
    "use-bnb-linear": "int8 layers (bitsandbytes): see --precision amp_bf16",
    "dataset-reinforcement": "MobileCLIP's reinforced data",
    "infloss": "Inf-CLIP's loss: --accum-freq trains with batches of any size exactly",
    **dict.fromkeys(("torchscript", "trace", "horovod"), _REMOVED),
    **dict.fromkeys(("fsdp-no-reshard-after-forward", "fsdp-offload-cpu"), _OFFLOAD),
    **dict.fromkeys(("scale", "exp-name", "num-checkpoints", "data-weights"), _DATACOMP),
    "use-bn-sync": "synchronized BatchNorm: each process normalizes by its own micro-batch",
    **dict.fromkeys(
        (
            "adaptive-tau", "denormalize-features", "init-lambda", "lambda-fit-neg-only",
            "learn-logit-bias", "logit-scale-clamp", "model-beta-init", "norm-cap",
            "normalize-type",
        ),
        _AMORLIP,
    ),
}  # fmt: skip
"""Flags of features that are out of scope, each with the feature and what to do instead."""

OUT_OF_SCOPE_PREFIXES: Mapping[str, str] = {
    "audio-": _AUDIO,
    "naflex-": _NAFLEX,
    "bucket-": _NAFLEX,
    "ref-": _REFERENCE,
    "cached-ref-": _REFERENCE,
    "cache-ref-": _REFERENCE,
}


@dataclass(frozen=True)
class Words:
    """A command line without the flags of other trainers.

    Attributes:
        rest: its words for the parser.
        notes: a line for each flag that was taken out.
    """

    rest: tuple[str, ...]
    notes: tuple[str, ...]


def read_words(
    argv: Sequence[str], targets: Mapping[str, str], whole_numbers: Iterable[str] = ()
) -> Words:
    """Takes the flags of other trainers out of a command line.

    Args:
        argv: the words.
        targets: what each flag that the parser knows sets; spellings of one flag share it.
        whole_numbers: flags whose value is a whole number; `4e8` and `[3]` are read as one.

    Raises:
        UserError: a flag is out of scope, or two spellings of a flag contradict each other.
    """
    _refuse_out_of_scope(argv)
    rest, notes = [], []
    left = list(argv)
    while left:
        word = left.pop(0)
        flag, name, value = _split(word)
        accepted = ACCEPTED.get(name)
        if accepted is None:
            rest.append(word)
            continue
        if accepted.takes_value and value is None:
            if not left:
                raise UserError(f"{flag} needs a value")
            value = left.pop(0)
        notes.append(_note(name, accepted, value if accepted.takes_value else None))
    rest = _with_whole_numbers(rest, set(whole_numbers))
    _refuse_contradictions(rest, targets)
    return Words(tuple(rest), tuple(notes))


def out_of_scope(name: str) -> str | None:
    """Why a flag is refused; none if it is not."""
    prefixed = (why for prefix, why in OUT_OF_SCOPE_PREFIXES.items() if name.startswith(prefix))
    return OUT_OF_SCOPE.get(name) or next(prefixed, None)


def flag_name(word: str) -> str:
    """The name of a word's flag with dashes; "" for a value."""
    return _split(word)[1]


def _refuse_out_of_scope(argv: Iterable[str]) -> None:
    refused: dict[str, list[str]] = {}
    for word in argv:
        flag, name, _ = _split(word)
        if why := out_of_scope(name):
            refused.setdefault(why, []).append(flag)
    if refused:
        lines = [f"{', '.join(flags)}: out of scope: {why}" for why, flags in refused.items()]
        raise UserError("\n".join(lines))


def _note(name: str, accepted: Accepted, value: str | None) -> str:
    given = f"--{name}" if value is None else f"--{name} {value}"
    if accepted.only and value not in accepted.only:
        raise UserError(f"{given}: only {accepted.only[0]} works here")
    return f"{given}: {accepted.note}"


def _split(word: str) -> tuple[str, str, str | None]:
    """A word's flag as it is typed, its name with dashes ("" for a value), and its value."""
    if not word.startswith("--"):
        return word, "", None
    flag, equals, value = word.partition("=")
    return flag, flag[2:].replace("_", "-"), value if equals else None


def _with_whole_numbers(words: Sequence[str], flags: set[str]) -> list[str]:
    """The words with values such as `4e8` as the parser reads whole numbers."""
    read: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        flag, name, value = _split(word)
        if f"--{name}" in flags and value is not None:
            read.append(f"{flag}={_whole_number(value)}")
        elif f"--{_split(before)[1]}" in flags:
            read.append(_whole_number(word))
        else:
            read.append(word)
    return read


def _whole_number(text: str) -> str:
    """A whole number as digits: of `4e8`, or AmorLIP's list of one number, `[3]`."""
    text = re.sub(r"^\[\s*(\d+)\s*\]$", r"\1", text)
    if re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", text) and float(text).is_integer():
        return str(int(float(text)))
    return text


def _refuse_contradictions(words: Sequence[str], targets: Mapping[str, str]) -> None:
    """Refuses two spellings of one flag with different values."""
    given: dict[str, tuple[str, str]] = {}
    for word, after in zip(words, [*words[1:], ""], strict=False):
        _, name, value = _split(word)
        target = targets.get(f"--{name}")
        if target is None:
            continue
        value = after if value is None else value
        earlier = given.setdefault(target, (name, value))
        if earlier[0] != name and earlier[1] != value:
            raise UserError(
                f"--{earlier[0]} {earlier[1]} and --{name} {value} set the same thing: leave one "
                "out"
            )
