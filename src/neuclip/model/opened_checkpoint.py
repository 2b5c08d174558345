"""Opens checkpoints: of a run folder, any file in open_clip's layout, or a repository on disk.

`open_checkpoint` reads the content, from which a `Checkpoint` builds towers and loss.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuclip.catalogue.create import build_loss
from neuclip.catalogue.method_info import RunFacts
from neuclip.checkpoint import storage
from neuclip.checkpoint.entries import own_entry, restoring
from neuclip.checkpoint.stored_tensors import check_loss
from neuclip.config.bounded_yaml import read_yaml_text
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.architecture import (
    HUB,
    LOCAL,
    Architecture,
    changes_of_flags,
    find_architecture,
    is_repository,
    recorded,
)
from neuclip.model.base_weights import ENTRY, LowRankRecord, hash_weights
from neuclip.model.checkpoint_choice import CheckpointChoice, chosen_path, require_single
from neuclip.model.clip import META, Clip, build_clip, init_for
from neuclip.model.device import Precision
from neuclip.model.ema import AVERAGES
from neuclip.model.foreign_weights import Given, fit, unwrap
from neuclip.model.lora import merge
from neuclip.model.mismatch import advice, check_size
from neuclip.model.published import (
    HubRepository,
    Published,
    doubt_of_preprocessing,
    fetch_published,
)
from neuclip.run_folder import RunFolder, open_clip_flags

log = logging.getLogger("neuclip")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: the chosen weights, and the facts recorded beside them.

    Attributes:
        choice: what was asked for.
        path: its file, or its folder if it is sharded.
        weights: by open_clip's names.
        averaged: whether the weights are the moving average of the run's weights.
        plain: whether they are not, although the checkpoint holds the average.
        epoch: number of full epochs trained, if recorded.
        name: of the run, if recorded.
        own: everything that only neuclip writes, such as `config`, `step` and `loss`; none if
            neuclip did not write the checkpoint.
        published: the name of the weights, if they were given by name.
        updates: of a checkpoint of LoRA, what it holds itself; `weights` are the merged ones.
        base_sha256: of a checkpoint of LoRA, the digest of its starting weights.
    """

    choice: CheckpointChoice
    path: Path
    weights: Mapping[str, Tensor]
    averaged: bool
    plain: bool
    epoch: int | None
    name: str | None
    own: Mapping[str, Any] | None
    published: Published | None = None
    updates: Mapping[str, Tensor] | None = None
    base_sha256: str = ""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights; of LoRA's, of the updates and of their starting weights."""
        held = self.weights if self.updates is None else self.updates
        return hash_weights(held, self.base_sha256)

    @cached_property
    def config(self) -> RunConfig | None:
        """The settings of the run; none if neuclip did not write the checkpoint."""
        tree = self._recorded_settings
        if tree is None:
            return None
        try:
            return validate(tree, str(self.path))
        except UserError as error:
            raise UserError(
                f"{error}\nthe settings in this checkpoint are not those of this version: use the "
                "version that wrote it, or start a new run from its weights (--pretrained)"
            ) from None

    @property
    def _recorded_settings(self) -> dict[str, Any] | None:
        """The settings of the run as a tree of plain values; None if there is no record."""
        if self.own is None:
            return None
        place = f"checkpoint {self.path}: the recorded configuration"
        tree = read_yaml_text(self.own["config"], place)
        if not isinstance(tree, dict):
            raise UserError(f"{place} has no sections")
        return tree

    def run_config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            UserError: neuclip did not write the checkpoint.
        """
        if self.config is None:
            raise UserError(
                f"{self.path} was not written by neuclip: its model and method are not recorded"
            )
        return self.config

    @cached_property
    def architecture(self) -> Architecture:
        """What the towers are built from: as recorded, with the changes that were asked for.

        Raises:
            UserError: it is neither recorded nor asked for, or cannot be built.
        """
        asked, found = self.choice.arch, self.recorded_architecture
        if asked is None and found is None:
            raise UserError(f"{self.path} does not record its architecture. {advice(self.weights)}")
        if found is None or asked not in (None, found.name):
            named = find_architecture(str(asked))
            found = named if found is None else named.preprocessed(found.preprocessing)
        return found.changed(self.choice.changes)

    @property
    def arch(self) -> str:
        """The name of the architecture.

        Raises:
            UserError: it is neither recorded nor asked for.
        """
        return self.architecture.name

    @cached_property
    def recorded_architecture(self) -> Architecture | None:
        """The architecture that comes with the weights; None if nothing records one.

        Raises:
            UserError: the record is damaged, or of an architecture that cannot be built.
        """
        if self.published is not None:
            return self.published.architecture
        if self.own is not None and "architecture" in self.own:
            return recorded(self.own["architecture"], self.path)
        if is_repository(self.choice.path):
            return find_architecture(f"{LOCAL}{self.choice.path}")
        settings = self._recorded_settings
        if settings is not None:  # an earlier version recorded the name alone
            model = settings.get("model")
            return find_architecture(str(model.get("name") if isinstance(model, dict) else model))
        if is_repository(self.path.parent):
            return find_architecture(f"{LOCAL}{self.path.parent}")
        return self._flags_architecture

    @property
    def _flags_architecture(self) -> Architecture | None:
        """The architecture in the record of flags that a run of open_clip has."""
        file = self.folder.open_clip_flags
        flags = open_clip_flags(file) if file.is_file() else {}
        if "model" not in flags:
            return None
        return find_architecture(flags["model"]).changed(changes_of_flags(flags), recorded=True)

    def given(self, weights: Mapping[str, Tensor] | None = None) -> Given:
        """The weights to load, with what is known of the towers that they were trained in.

        Args:
            weights: some of them, or others in their place; none: all.
        """
        weights = self.weights if weights is None else weights
        trained = self.recorded_architecture
        quick_gelu = None if trained is None else trained.quick_gelu
        if self.published is not None:
            quick_gelu = self.published.quick_gelu
        return Given(weights, self.shown, trained, quick_gelu)

    @property
    def shown(self) -> Path:
        """What messages call the weights: their name, or their file."""
        return self.path if self.published is None else Path(self.published.name)

    @property
    def step(self) -> int:
        """Number of training steps; 0 if neuclip did not write the checkpoint."""
        return int(self.own["step"]) if self.own else 0

    @property
    def global_batch_size(self) -> int:
        """Pairs in a training step; 0 if neuclip did not write the checkpoint."""
        return int(self.own["global_batch_size"]) if self.own else 0

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder.of_checkpoint(self.path)

    @property
    def results(self) -> Path:
        """The file for evaluation results of these weights, in `eval_results` of the run folder."""
        if self.published is not None:
            return RunFolder(Path()).results_of(self.published.label)
        name = self.path.stem
        if name in {"epoch_latest", "epoch_best"} and self.epoch is not None:
            name = f"epoch_{self.epoch}"
        if is_repository(self.choice.path):
            name = "repository"
        return self.folder.results_of(name, plain=self.plain)

    def build_clip(self, precision: Precision, device: torch.device) -> Clip:
        """Builds the model with these weights.

        Raises:
            UserError: the architecture is unknown, or the weights belong to another one.
        """
        architecture = self.architecture
        doubt = doubt_of_preprocessing(architecture)
        if doubt is not None:
            log.warning(doubt)
        check_size(self.shown, self.weights, architecture, self.recorded_architecture)
        clip = build_clip(architecture, precision, device, init_for(self.weights))
        weights = fit(self.given(), clip)
        storage.load_weights(clip.towers, weights, self.shown)
        return clip

    def build_loss(self, clip: Clip, device: torch.device) -> PairLoss:
        """Builds the loss of the run with its full state, on every rank.

        Raises:
            UserError: neuclip did not write the checkpoint, so its method is unknown; or the
                method's settings are for a loss far larger than the state of the loss.
        """
        config = self.run_config()
        assert self.own is not None
        run = RunFacts(
            clip.embed_dim,
            self.own["steps_per_epoch"],
            self.own["num_samples"],
            self.global_batch_size,
            sharded=False,
            adam=config.optim.adam,
            total_steps=config.optim.epochs * self.own["steps_per_epoch"],
        )
        with META:
            check_loss(build_loss(config.method, run), self.own["loss"], self.path)
        loss = build_loss(config.method, run).to(device)
        storage.load_loss(loss, self.own["loss"], self.path)
        return loss


def open_checkpoint(
    choice: CheckpointChoice, *, verified: bool = False, model: str | None = None
) -> Checkpoint:
    """Reads a checkpoint onto the CPU; published weights are downloaded. Called by all ranks.

    Args:
        choice: which checkpoint and which weights.
        model: the architecture that the weights are for; none: that of the choice.
        verified: its checksums were compared already; it is not hashed again.

    Raises:
        UserError: no such checkpoint (another one is never taken instead), or it is damaged.
    """
    if choice.arch is not None and choice.arch.startswith(HUB):
        fetch_published(choice.arch, None)
    published = fetch_published(str(choice.path), model or choice.arch)
    if published is not None:
        asked = choice if isinstance(published, HubRepository) else replace(choice, arch=None)
        choice = replace(choice, path=published.path)
        require_single(replace(asked, path=Path(published.name)))
    path = chosen_path(choice, model)
    found = storage.read(storage.VerifiedCheckpoint(path) if verified else path)
    content = found if isinstance(found, dict) else {}
    averaged = choice.ema and AVERAGES in content
    weights = unwrap(content[AVERAGES] if averaged else found, path)
    own = own_entry(content, path)
    opened = Checkpoint(
        choice=choice,
        path=path,
        weights=weights,
        averaged=averaged,
        plain=AVERAGES in content and not averaged,
        epoch=_whole_number(content.get("epoch")),
        name=name if isinstance(name := content.get("name"), str) else None,
        own=own,
        published=published,
    )
    return opened if own is None or own.get(ENTRY) is None else _with_base(opened, own[ENTRY])


def _with_base(opened: Checkpoint, entry: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of LoRA with the weights of plain towers.

    Raises:
        UserError: its starting weights are gone, or changed.
    """
    record = LowRankRecord.read(entry, opened.path)
    assert opened.own is not None
    architecture = recorded(opened.own["architecture"], opened.path)
    base = find_base(opened.path, record, architecture.name)
    updates = opened.weights
    given = {**base.weights, **{k: v for k, v in updates.items() if k.startswith("logit_")}}
    check_size(base.shown, base.weights, architecture, base.recorded_architecture)
    clip = build_clip(architecture, "fp32", META, init_for(updates))
    with restoring(opened.path):
        merged = merge(fit(base.given(given), clip), updates, record.scale)
    return replace(opened, weights=merged, updates=updates, base_sha256=base.sha256)


def find_base(path: Path, record: LowRankRecord, model: str) -> Checkpoint:
    """The starting weights of a checkpoint of LoRA, wherever they lie now.

    Args:
        path: the checkpoint.
        record: what it holds of them.
        model: the architecture.

    Raises:
        CheckpointError: they are gone, or changed.
    """
    others = list[str]()
    for place in record.places(path, model):
        if place == path or not os.path.exists(place):  # noqa: PTH110  Path.exists may raise
            continue
        try:
            base = open_checkpoint(CheckpointChoice(place, ema=False), model=model)
        except UserError as error:
            others.append(f"{place} cannot be read: {str(error).splitlines()[0]}. ")
            continue
        if base.sha256 == record.sha256:
            return base
        others.append(f"{place} holds other weights (sha256:{base.sha256[:16]}). ")
    raise record.missing(path, "".join(dict.fromkeys(others)))


def _whole_number(value: object) -> int | None:
    return int(value) if isinstance(value, Integral) else None
