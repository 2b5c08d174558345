"""What `neuclip finetune --dry-run` prints: each derived setting with its reason."""

import shlex
from collections.abc import Sequence

from neuclip.cli import terminal
from neuclip.cli.flag_table import flag_of
from neuclip.cli.train import TrainCommand
from neuclip.config.batch_size import describe_step
from neuclip.config.derived import Derived
from neuclip.config.resolve import resolve
from neuclip.parallel.launch import launch_environment


def show_derived(command: TrainCommand) -> int:
    """Prints the settings that are derived, and the `neuclip train` line that gives them all."""
    from neuclip.model.starting_weights import StartingWeightsReader
    from neuclip.training.finetuning import (
        check_evaluation,
        check_length,
        check_weights,
        complete,
        trained_weights,
    )
    from neuclip.training.training_data import TrainingData

    data = TrainingData(command.config, str(command.config.data.train_data))
    weights = StartingWeightsReader()
    try:
        config, derived = complete(command.config, data, weights)
        launch = launch_environment()
        resolved = resolve(config, launch.world_size)
        if launch.rank:
            return 0
        best = None
        if derived:
            check_length(resolved, data)
            best = check_evaluation(resolved, data).best
    finally:
        data.close()
    if not derived:
        terminal.print_plain(f"{config.name} is continued: its settings stay as it recorded them")
        return 0
    check_weights(config, weights)
    trained = trained_weights(config).text  # an error stands alone, not below the table
    terminal.print_reasons(
        (flag_of(d.section, d.key), " ".join(d.words), d.reason) for d in derived
    )
    pairs = describe_step(resolved, launch.world_size)
    print()
    method = resolved.method.method
    facts = [("pairs per step", pairs), ("method", method), ("trained", trained)]
    if best is not None:
        facts.append(("best epoch by", best.name))
    terminal.print_facts(facts)
    print("\nthe same as")
    terminal.print_plain(train_line(command.argv, derived))  # not wrapped: it is copied
    return 0


def train_line(argv: Sequence[str], derived: Sequence[Derived]) -> str:
    """The line of `neuclip train` that needs no derivation.

    Args:
        argv: the line that derived settings, from its command on.
        derived: these settings.
    """
    words = [word for word in argv[1:] if word != "--dry-run"]
    for place in [at for at, word in enumerate(words) if word == "--recipe"]:
        words[place : place + 2] = []
    words = [word for word in words if not word.startswith("--recipe=")]
    for one in derived:
        words += [flag_of(one.section, one.key), *one.words]
    return shlex.join(["neuclip", "train", *words])
