"""A plain training loop: epochs, schedule, collections of weights, checkpoints, exact resume."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lowrank_bdl.errors import CheckpointError, NonFiniteError, ShapeError
from lowrank_bdl.linalg.devices import in_dtype, sums_device
from lowrank_bdl.progress import progress_bar
from lowrank_bdl.training import checkpoints, random_state
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.losses import Loss, Metric, cross_entropy

Data: TypeAlias = "Callable[[torch.Generator], Iterable[Any]] | Iterable[Any]"
Record: TypeAlias = dict[str, Any]
ADVICE = "lower the learning rate, or clip the gradient's norm"


class Trainer:
    r"""Train a model, show its weights to collectors, and resume to the last bit.

    One epoch is one pass over the data: forward, backward, clip, step, collect. What an epoch draws is a function of
    (seed, epoch): the data get a generator seeded from both, and the global generators, which dropout uses, are part of
    a checkpoint. So a run that was killed and goes on from its last checkpoint does the same arithmetic as one that
    was not. Losses and metrics weigh batches by their size and are summed on the device in float64: the loop waits for
    the device once an epoch (and once a snapshot, to keep non-finite weights out of it).

    Args:
        model: Trained in place.
        optimizer: Of the model's parameters.
        loss: ``loss(model, inputs, targets) -> (mean loss, output)``; see :mod:`lowrank_bdl.training.losses`.
        schedule: Any torch scheduler of the optimizer whose ``step`` needs no argument, or None.
        step_every: ``"epoch"`` or ``"batch"``: when the schedule steps.
        collections: Collectors and their moments, by name.
        metrics: Further means over an epoch by name, each ``metric(output, targets) -> 0-d tensor``.
        seed: Seed of the data's order and augmentation; initial weights are the caller's.
        clip_grad_norm: Largest Euclidean norm of the gradient; None does not clip.
        autocast: bfloat16 or float16 for mixed precision (float16 with loss scaling), None for none.
        memory_format: What 4-d inputs are converted to, such as ``torch.channels_last`` (the model is the caller's).

    Attributes:
        epoch: Number of epochs done.
        history: A record for each of them: ``epoch``, ``lr`` (of the first group, at the start of the epoch),
            ``loss``, the metrics, and what ``after_epoch`` added.

    Raises:
        ValueError: If ``step_every`` or ``autocast`` is unknown, ``clip_grad_norm`` is not positive, or the schedule is
            of another optimizer.

    Example:
        >>> from lowrank_bdl.posteriors.swag import SWAG
        >>> net = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> swag = SWAG(net, rank=3)
        >>> x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
        >>> def batches(generator):
        ...     order = torch.randperm(20, generator=generator)
        ...     return [(x[part], (x[part, 0] > 0).long()) for part in order.split(8)]
        >>> trainer = Trainer(net, optimizer, collections={"swag": Collection(swag, start=2)})
        >>> trainer.fit(batches, epochs=6, progress=False)
        >>> trainer.epoch, swag.n_averaged, trainer.history[-1]["loss"] < trainer.history[0]["loss"]
        (6, 4, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss = cross_entropy,
        *,
        schedule: LRScheduler | None = None,
        step_every: str = "epoch",
        collections: Mapping[str, Collection] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        seed: int = 0,
        clip_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        if step_every not in ("epoch", "batch"):
            raise ValueError(f"step_every must be 'epoch' or 'batch'; got {step_every!r}.")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16; got {autocast}.")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be positive; got {clip_grad_norm}.")
        if schedule is not None and schedule.optimizer is not optimizer:
            raise ValueError("schedule must be of the optimizer that the trainer steps; got one of another.")
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.schedule, self.step_every = schedule, step_every
        self.collections, self.metrics = dict(collections or {}), dict(metrics or {})
        self.seed, self.clip_grad_norm = seed, clip_grad_norm
        self.autocast, self.memory_format = autocast, memory_format
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.scaler = torch.amp.GradScaler(self.device.type) if autocast is torch.float16 else None
        self.epoch = 0
        self.history: list[Record] = []

    # ---- one epoch ----------------------------------------------------------------------------------------------

    def train_epoch(self, data: Data, *, progress: bool = False) -> Record:
        """Pass over the data once.

        Args:
            data: ``data(generator)`` gives the epoch's batches ``(inputs, targets)``, drawing their order from the CPU
                generator it is given; or an iterable of batches that can be iterated again. A DataLoader's own
                generator is reseeded from (seed, epoch); one without, but with shuffling, draws from the global state.
            progress: Show a bar over the batches, on a terminal.

        Returns:
            The record of the epoch, also appended to ``history``.

        Raises:
            NonFiniteError: If the loss or a weight is no longer finite. The model is beyond repair then.
            ShapeError: If there is no batch.
        """
        number = self.epoch + 1
        lr = float(self.optimizer.param_groups[0]["lr"])
        sums = torch.zeros(1 + len(self.metrics), dtype=torch.float64, device=sums_device(self.device))
        batches = self._batches(data)
        num_batches = self._length(batches)
        size = count = 0
        self.model.train()
        bar = progress_bar(
            batches,
            total=num_batches,
            description=f"epoch {number}",
            unit="batch",
            leave=False,
            show=progress,
        )
        for count, (inputs, targets) in enumerate(bar, start=1):
            sums += self._step(self._place(inputs), self._place(targets)) * len(targets)
            size += len(targets)
            self._collect(number, count, num_batches, sums)
        if count == 0:
            raise ShapeError("data must give at least one batch; got none (an exhausted iterator?).")
        means = (sums / size).tolist()
        self._require_finite(number, means[0])
        self._collect_at_end(number)
        if self.schedule is not None and self.step_every == "epoch":
            self.schedule.step()
        self.epoch = number
        record = {"epoch": number, "lr": lr, "loss": means[0], **dict(zip(self.metrics, means[1:], strict=True))}
        self.history.append(record)
        return record

    def _step(self, inputs: Any, targets: Any) -> Tensor:
        """Take one optimiser step; return the batch's loss and metrics, float64."""
        self.optimizer.zero_grad()
        with self._precision():
            loss, output = self.loss(self.model, inputs, targets)
        with torch.autocast(self.device.type, enabled=False):  # the passes have chosen their precision in the forward
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is None:
            self._clip()
            self.optimizer.step()
        else:
            self.scaler.unscale_(self.optimizer)
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.schedule is not None and self.step_every == "batch":
            self.schedule.step()
        with torch.no_grad():
            found = [loss.detach(), *(metric(output, targets) for metric in self.metrics.values())]
            return torch.stack([in_dtype(value.detach(), torch.float64, self.device) for value in found])

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def _clip(self) -> None:
        if self.clip_grad_norm is not None:
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.memory_format is not None and value.ndim == 4:
            return value.to(self.device, memory_format=self.memory_format, non_blocking=True)
        return value.to(self.device, non_blocking=True)

    def _batches(self, data: Data) -> Iterable[Any]:
        seed = self.seed * 1_000_003 + self.epoch
        if callable(data):
            return data(torch.Generator().manual_seed(seed))
        if isinstance(data, DataLoader):
            if data.generator is not None:
                data.generator.manual_seed(seed)
            set_epoch = getattr(data.sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epoch)
        return data

    def _length(self, batches: Iterable[Any]) -> int | None:
        try:
            return len(batches)  # type: ignore[arg-type]
        except TypeError:
            wanted = [name for name, c in self.collections.items() if c.per_epoch is not None and c.per_epoch > 1]
            if wanted:
                raise TypeError(
                    f"collection {wanted[0]!r} takes several snapshots in an epoch, so data must have a length; "
                    f"got {type(batches).__name__}."
                ) from None
            return None

    # ---- collections --------------------------------------------------------------------------------------------

    def _collect(self, epoch: int, batch: int, num_batches: int | None, sums: Tensor) -> None:
        """Show the weights to the collectors that are due inside an epoch; those due at its end are checked first."""
        for collection in self.collections.values():
            if collection.per_epoch is None:
                if collection.in_epoch(epoch):
                    self._show(collection, epoch)
            elif num_batches is not None and batch < num_batches and collection.is_due(epoch, batch, num_batches):
                self._require_finite(epoch, (sums[0] / batch).item())
                self._show(collection, epoch)

    def _collect_at_end(self, epoch: int) -> None:
        for collection in self.collections.values():
            if collection.per_epoch is not None and collection.in_epoch(epoch):
                self._show(collection, epoch)

    def _show(self, collection: Collection, epoch: int) -> None:
        try:
            collection.collector.update_parameters(self.model)
        except NonFiniteError as error:  # weights that are too large to square, say
            raise NonFiniteError(f"training diverged: {error} This was in epoch {epoch}; {ADVICE}.") from error

    @torch.no_grad()
    def _require_finite(self, epoch: int, loss: float) -> None:
        if loss - loss != 0:  # NaN and both infinities
            raise NonFiniteError(f"training diverged: loss {loss} in epoch {epoch}; {ADVICE}.")
        named = [(name, p) for name, p in self.model.named_parameters() if p.numel()]
        flags = [p.isfinite().all().to(self.device) for _, p in named]  # a model may lie on several devices
        finite = torch.stack(flags) if flags else torch.ones(1, dtype=torch.bool)
        if not bool(finite.all()):
            name = named[int(finite.int().argmin())][0]
            raise NonFiniteError(f"training diverged: parameter {name!r} is not finite in epoch {epoch}; {ADVICE}.")

    # ---- many epochs --------------------------------------------------------------------------------------------

    def fit(
        self,
        data: Data,
        epochs: int,
        *,
        after_epoch: "Callable[[Trainer, Record], Mapping[str, Any] | None] | None" = None,
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: int = 1,
        keep_every: int | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
        description: str = "training",
    ) -> None:
        """Train until ``epochs`` epochs are done, those before a resume included.

        Args:
            data: As in :meth:`train_epoch`.
            epochs: Number of epochs in all; nothing happens if so many are done.
            after_epoch: ``after_epoch(trainer, record)``, called before the checkpoint is written; JSON-able entries
                that it returns are added to the record.
            checkpoint: File that is replaced after every ``save_every`` epochs and after the last; None for none.
            save_every: Epochs between two checkpoints, >= 1.
            keep_every: Epochs between two checkpoints that are kept beside the file, with their epoch in the name:
                ``run-25.safetensors`` for ``run.safetensors``. None keeps none.
            settings: Stored with the checkpoint; :meth:`load` compares them.
            progress: Show a progress bar.
            description: Its title.

        Raises:
            NonFiniteError: If training diverges.
            ValueError: If ``save_every`` or ``keep_every`` < 1.
        """
        for name, interval in (("save_every", save_every), ("keep_every", keep_every)):
            if interval is not None and interval < 1:
                raise ValueError(f"{name} must be at least 1 epoch; got {interval}.")
        with progress_bar(
            total=epochs,
            initial=min(self.epoch, epochs),
            description=description,
            unit="epoch",
            show=progress,
        ) as bar:
            for record in self._epochs(data, epochs, progress):
                if after_epoch is not None:
                    record.update(after_epoch(self, record) or {})
                bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.3g}", refresh=False)
                bar.update()
                if checkpoint is None:
                    continue
                if keep_every is not None and self.epoch % keep_every == 0:
                    kept = checkpoints.numbered(checkpoint, self.epoch)
                    self.save(kept, settings)
                    checkpoints.link(kept, checkpoint)
                elif self.epoch % save_every == 0 or self.epoch == epochs:
                    self.save(checkpoint, settings)

    def _epochs(self, data: Data, epochs: int, progress: bool) -> Iterator[Record]:
        while self.epoch < epochs:
            yield self.train_epoch(data, progress=progress)

    def save(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> None:
        """Write everything that training goes on from, atomically, as tensors and JSON.

        Args:
            path: The file; replaced if it exists.
            settings: JSON-able values that :meth:`load` compares.

        Raises:
            TypeError: If a state or setting is neither tensors nor JSON; names it.
            OSError: If the file cannot be written; an old one is left as it was.
        """
        checkpoints.write(path, self.state_dict(), self._facts(), dict(settings or {}))

    def load(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Go on from a file of :meth:`save`.

        Sets model, optimizer, schedule, collectors, epoch, history, and the global random generators. Rates, momentum
        and the like are those of the checkpoint.

        Args:
            path: The file.
            settings: If given, must equal those saved.

        Returns:
            The settings saved.

        Raises:
            CheckpointError: If the file is truncated or foreign, fits another model, optimizer, schedule or set of
                collections, or has other settings. Nothing is changed then, save by a collector of your own that
                refuses its state after others have taken theirs.
            FileNotFoundError: If there is no such file.
        """
        state, facts, saved = checkpoints.read(path)
        try:
            if settings is not None:
                checkpoints.refuse_differences("settings", saved, json.loads(json.dumps(dict(settings))))
            checkpoints.refuse_differences("the training runs", facts, json.loads(json.dumps(self._facts())))
            self.load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(f"{os.fspath(path)} is of another training run: {error}") from error
        return saved

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training goes on from, the states of the global random generators included."""
        schedule = None if self.schedule is None else checkpoints.without_functions(self.schedule.state_dict())
        return {
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "collections": {name: c.collector.state_dict() for name, c in self.collections.items()},
            "random": random_state.capture(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the global random generators are set too.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            CheckpointError: If it does not fit; see :meth:`load`.
        """
        try:
            checkpoints.check_module("the model", self.model, state["model"])
            checkpoints.check_optimizer(self.optimizer, state["optimizer"])
            for name, c in self.collections.items():
                if isinstance(c.collector, nn.Module):
                    checkpoints.check_module(f"collection {name!r}", c.collector, state["collections"][name])
            for name, c in self.collections.items():  # may refuse what it is given, so before the model
                c.collector.load_state_dict(state["collections"][name])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            random_state.restore(state["random"], self.device)
            self.epoch, self.history = int(state["epoch"]), list(state["history"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{type(error).__name__} {' '.join(str(error).split())}") from error

    def _facts(self) -> dict[str, Any]:
        """What a resumed run must share."""
        facts: dict[str, Any] = {
            "optimizer": type(self.optimizer).__name__,
            "schedule": None if self.schedule is None else type(self.schedule).__name__,
            "step_every": self.step_every,
            "seed": self.seed,
            "clip_grad_norm": self.clip_grad_norm,
            "autocast": None if self.autocast is None else str(self.autocast),
            "metrics": list(self.metrics),
        }
        for name, c in self.collections.items():
            moments = f"start={c.start}, every={c.every}, per_epoch={c.per_epoch}"
            facts[f"collection {name}"] = f"{type(c.collector).__name__}({moments})"
        return facts
