"""The training data of a run: opened once, with what is held out of them and what repeats."""

import logging
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neuclip.catalogue.registry import method_info
from neuclip.config.run_config import RunConfig
from neuclip.data.damage import check_index, check_read_once
from neuclip.data.groups import Groups, check_labels, components, read_groups
from neuclip.data.opening import open_source
from neuclip.data.sources.source import Source
from neuclip.evaluation.held_out import HeldOut, hold_out
from neuclip.parallel.work_sharing import from_main, in_turn

log = logging.getLogger("neuclip")


class TrainingData:
    """The source that `--train-data` names, opened when it is first needed.

    All ranks use it together.

    Args:
        config: names the data and how they are read; a method with a state per sample needs ids.
        train_data: the data.
    """

    def __init__(self, config: RunConfig, train_data: str) -> None:
        self._config, self._train_data = config, train_data

    @cached_property
    def source(self) -> Source:
        """All samples.

        Raises:
            UserError: the data cannot be opened.
        """
        return in_turn(lambda: read_index(self._config, self._train_data))

    def close(self) -> None:
        """Closes the source if it was opened."""
        if "source" in self.__dict__:
            self.source.close()

    def divided(self, config: RunConfig) -> tuple[Source, HeldOut | None]:
        """The samples to train on, and those of `--val-split`.

        Args:
            config: the settings of the run, resolved.

        Raises:
            UserError: too much is corrupt, or nothing can be held out.
        """
        index, limit = self.source, config.data.max_bad_fraction
        check_index(index.damage, limit, samples=len(index), shards=len(index.layout.ends))
        share = config.evaluation.val_split
        if share is None:
            return index, None
        held_out = hold_out(index, config.data, share, config.seed)
        from_main(lambda: _check_readable(held_out.all_groups, limit))
        held_out.check_batch(config.data.global_batch_size or config.data.batch_size)
        return held_out.rest, held_out

    def components(self, config: RunConfig, held_out: HeldOut | None) -> NDArray[np.int64] | None:
        """The component of each sample to train on, for `--no-duplicates`; none without.

        Args:
            config: the settings of the run.
            held_out: what `divided` held out.

        Raises:
            UserError: all labels are equal.
        """
        data, index = config.data, self.source if held_out is None else held_out.rest
        if data.label_key is not None and data.labels_join:
            check_labels(index, data.label_key)
        if not data.no_duplicates:
            return None
        if held_out is not None:
            return in_turn(lambda: components(held_out.groups_of_rest(data)))
        log.info(
            "--no-duplicates: looks at every sample once to find duplicates; kept for later runs"
        )
        return in_turn(lambda: self._components_of_all(config))

    def _components_of_all(self, config: RunConfig) -> NDArray[np.int64]:
        groups = read_groups(self.source, config.data)
        _check_readable(groups, config.data.max_bad_fraction)
        return components(groups)


def _check_readable(groups: Groups | None, max_bad_fraction: float) -> None:
    """Checks samples that were all read to find groups: a run would stop after some steps.

    Raises:
        UserError: too many are corrupt.
    """
    if groups is not None:
        check_read_once(groups.unreadable, max_bad_fraction, samples=groups.samples)


def read_index(config: RunConfig, train_data: str) -> Source:
    """Opens the training data; keys must be sample ids only if the method keeps a table."""
    data, method = config.data, config.method
    needs_ids = method.needs_sample_ids or method_info(method.method).needs_sample_ids
    if data.data_size is not None and not needs_ids:
        log.info("--data-size is not needed: %s keeps no state per sample", method.method)
    return open_source(
        train_data, data if needs_ids else data.model_copy(update={"data_size": None})
    )
