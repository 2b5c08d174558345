"""What NeuCLIP's paper states, and the readings that the method `neuclip` adds to it."""

from neuclip.catalogue.method_info import Statement

_CODE = "NeuCLIP's code, which this project has not seen"

STATEMENTS = (
    Statement(
        "alpha minimises a conjugate form; m prototypes a side predict it, by the form of its "
        "optimum"
    ),
    Statement("prototypes and towers step in alternation, T_u prototype steps a batch"),
    Statement("prototypes restart from embeddings every T_r steps"),
    Statement("m = 4,096, T_u = 10, T_r = 500; AdaGrad with learning rate 1"),
    Statement(
        "the prediction is mixed with the batch estimate by gamma, as a moving average is: the "
        "published line has --gamma beside --npn, and no text says what it does there",
        setting="mixing: gamma",
        other="--mixing none",
        settled_by=f"{_CODE}, or a sentence on gamma",
    ),
    Statement(
        "AdaGrad keeps one scalar for each matrix: by coordinate, a first step with learning rate "
        "1 would move every coordinate by 1 and undo the restart",
        setting="prototype_optimizer: adagrad_norm",
        other="--npn-optimizer adagrad",
        settled_by=_CODE,
    ),
    Statement(
        "a restart takes embeddings of the batches before the current one: an anchor's positive is "
        "not a negative",
        setting="restart_from: earlier",
        other="--restart-from current",
        settled_by=_CODE,
    ),
    Statement(
        "a restart also resets the prototypes' optimiser",
        setting="restart_optimizer: true",
        other="--no-restart-optimizer",
        settled_by=_CODE,
    ),
    Statement(
        "where m exceeds the batch, a restart takes the newest m embeddings of several batches; on "
        "the published line m is the batch",
        setting="restart_fill: pool",
        other="--restart-fill batch",
        settled_by="a published run with m above the batch",
    ),
    Statement(
        "the temperature's gradient counts its part through g twice, as FastCLIP's code does: the "
        "published rho and lr_tau are near FastCLIP's",
        setting="temperature_gradient: fastclip",
        other="--temperature-gradient exact",
        settled_by=_CODE,
    ),
    Statement(
        "the loss is half the sum of the two sides, as in FastCLIP's code; DRRho-CLIP's code, "
        "which takes the same flags, sums them",
        setting="objective_scale: fastclip",
        other="--objective-scale drrho",
        settled_by=_CODE,
    ),
)
