"""The record of the data that a run has read: a fingerprint of its samples, and corrupt samples."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from neuclip.data.batch import Batch
from neuclip.data.damage import DamageLog, DamageReport
from neuclip.data.identity import DataIdentity
from neuclip.data.samples import Damage
from neuclip.errors import UserError
from neuclip.files import write_whole
from neuclip.parallel import collectives
from neuclip.run_folder import RunFolder
from neuclip.training.records.fingerprint import add_to_fingerprint

log = logging.getLogger("neuclip")


class DataRecord:
    """What this rank has read, added up over ranks when it is reported or saved.

    Args:
        max_bad_fraction: the largest fraction of corrupt samples before the run ends.
        shard_damage: what the index of the training data could not read.
        data: identity of the training data.
        unused: what the training data hold but the run does not read, in one line per reason.
    """

    def __init__(
        self,
        max_bad_fraction: float,
        shard_damage: Sequence[Damage],
        data: DataIdentity,
        unused: Sequence[str] = (),
    ) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._data, self._unused = data, list(unused)
        self._fingerprint = 0
        self._seen = 0  # samples since this process started
        self._damage = DamageLog()
        self._before_resume = DamageLog()  # of all ranks; kept by the main process only
        if collectives.is_main():
            self._damage.add(shard_damage)

    def add(self, batches: Sequence[Batch]) -> None:
        """Counts the samples of a step.

        Raises:
            UserError: too many samples are corrupt.
        """
        for batch in batches:
            self._fingerprint = add_to_fingerprint(self._fingerprint, batch.sample_ids)
            self._seen += len(batch)
            for damage in self._damage.add(batch.damage):
                log.warning("corrupt: %s", damage)
        self._damage.check(self._max_bad_fraction, self._seen)

    def fingerprint(self) -> int:
        """The fingerprint of all ranks' samples; all ranks call this together."""
        return sum(collectives.gather_objects(self._fingerprint)) % 2**64

    def damage(self) -> DamageReport:
        """The corrupt samples of all ranks since the first step; all ranks call this together."""
        return self._with_earlier(collectives.gather_objects(self._damage.report()))

    def resume(self, fingerprint: int, damage: DamageReport) -> None:
        """Continues the record of a checkpoint.

        Args:
            fingerprint: as `fingerprint` returned it.
            damage: as `damage` returned it; it includes the index's damage.
        """
        self._damage = DamageLog()
        if collectives.is_main():
            self._before_resume = DamageLog.from_report(damage)
            self._fingerprint = fingerprint

    @contextmanager
    def reporting(self, folder: RunFolder) -> Generator[None]:
        """Writes `data_report.json` at the start and the end of a block, even if it fails."""
        if collectives.is_main():  # a killed run keeps the identity of its data
            self._write(folder, self._with_earlier([self._damage.report()]))
        try:
            yield
        except BaseException:
            if collectives.is_main():
                # The other ranks may be gone: report this rank's own. A full disk must not
                # hide the failure.
                with contextlib.suppress(UserError):
                    self._end(folder, self._with_earlier([self._damage.report()]))
            raise
        report = self.damage()
        if collectives.is_main():
            self._end(folder, report)

    def _end(self, folder: RunFolder, report: DamageReport) -> None:
        """Writes the report of a run that ends, and logs what is corrupt."""
        if report["total"]:
            counts = DamageLog.from_report(report).summary()
            log.warning("corrupt samples or shards: %s; see %s", counts, folder.data_report)
        self._write(folder, report)

    def _write(self, folder: RunFolder, report: DamageReport) -> None:
        content = {"data": dataclasses.asdict(self._data), "not_read": self._unused, **report}
        write_whole(folder.data_report, json.dumps(content, indent=2) + "\n")

    def _with_earlier(self, reports: Sequence[DamageReport]) -> DamageReport:
        total = DamageLog.from_report(self._before_resume.report())
        for report in reports:
            total.add_report(report)
        return total.report()
