"""The loop: steps, evaluations, saves, stops.

Takes everything assembled; runs from a position in the data to the end of the run or a stop. Every process runs the
same loop; what one learns by itself (a signal, a file, the clock) is agreed on at the step boundary.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from pipeline.artifacts.adapter_files import adapter_norms
from pipeline.console import EXIT_DONE, EXIT_STOPPED, say
from pipeline.data.batches import MicroBatches, Position, StepInfo
from pipeline.data.evaluation import EvaluationBatches
from pipeline.training import checkpoint, evaluation
from pipeline.training.engine import Place
from pipeline.training.metrics import Clock, Metrics, peak_memory
from pipeline.training.optimizer import UPDATE_LOCK, NonFiniteError, PipelineOptimizer
from pipeline.training.run_state import Progress, RunState
from pipeline.training.stop import Watcher

SIGNAL_FILES = ("save", "save_quit")


@dataclass(frozen=True)
class Cadence:
    """When things happen, in optimizer steps, epochs or minutes; None is never. Names and meanings are the config's."""

    epochs: int | None
    max_steps: int | None
    logging_steps: int
    steps_per_print: int
    eval_steps: int | None
    eval_before_first_step: bool
    eval_after_last_step: bool
    save_steps: int | None
    save_every_n_epochs: int
    save_checkpoint_on_epoch_end: bool
    checkpoint_every_n_minutes: float | None
    checkpoint_on_save: bool
    keep_states: int


@dataclass
class Trainer:
    """One run on one process. `learning_rate(step, total)` and `save_artifact(folder)` are the config's choices."""

    engine: PipelineEngine
    place: Place
    optimizer: PipelineOptimizer
    batches: MicroBatches
    evaluations: dict[str, EvaluationBatches]
    row_losses: Callable[..., Tensor]
    learning_rate: Callable[[int, int], float]
    save_artifact: Callable[[Path], None]
    adapter: tuple[dict[str, Any], float] | None  # this stage's adapter tensors and their scaling
    cadence: Cadence
    state: RunState
    metrics: Metrics
    watcher: Watcher
    run_dir: Path
    launch: str
    resume_line: str
    step: int = 0
    position: Position = field(default_factory=Position)
    best_loss: float | None = None
    _saved_steps: set[int] = field(default_factory=set)
    _artifact_step: int = -1
    _one_save: threading.Lock = field(default_factory=threading.Lock)
    _last_checkpoint: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """To the end of the run (exit code 0) or to a stop (75)."""
        self._now_complete()
        self.watcher.attach(self.run_dir, self._save_between_boundaries)
        if self.step == 0 and self.cadence.eval_before_first_step:
            self._evaluate(may_be_best=False)
            self._now_complete()
        total = self.total_steps()
        clock = Clock(total)
        while self.step < total:
            info = self._train_step(clock, total)
            self._after_step(info, last=self.step == total)
            if self._boundary():
                return self._stopped()
        self._finish()
        return EXIT_DONE

    def total_steps(self) -> int:
        """Steps of the whole run: those done, and those from here to the end of the last epoch or to max_steps."""
        steps = self.step
        if self.cadence.epochs is None:
            return self.cadence.max_steps or steps
        if self.position.epoch < self.cadence.epochs:
            steps += self.batches.steps_left(self.position)
            steps += sum(self.batches.steps_per_epoch(e) for e in range(self.position.epoch + 1, self.cadence.epochs))
        return min(steps, self.cadence.max_steps or steps)

    def checkpoint(self) -> None:
        """Save the last completed step. Also called by the watcher's thread; safe against the main thread's own save."""
        with self._one_save:
            while (step := self.optimizer.completed_steps) not in self._saved_steps:
                step, tensors, facts = self.state.snapshot()
                with contextlib.suppress(
                    checkpoint.Superseded
                ):  # another process has completed a later step; so will this
                    checkpoint.save(self.run_dir, self.launch, self.place.rank, self.place.world, step, tensors, facts)
                    self._saved_steps.add(step)

    def _train_step(self, clock: Clock, total: int) -> StepInfo:
        """One optimizer step; NonFiniteError names the documents it came from."""
        micro_batches, info = self.batches.step(self.position)
        lr = self.learning_rate(self.step, total)
        self.optimizer.set_lr(lr)
        self.state.ahead(self.step + 1, self._progress(info.next_position))
        clock.start()
        try:
            loss = float(self.engine.train_batch(iter([evaluation.as_inputs(batch) for batch in micro_batches])))
            if not math.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss}")
        except NonFiniteError as error:
            documents = self.batches.documents(info.rows)
            shown = "\n  ".join(documents[:20]) + (f"\n  and {len(documents) - 20} more" if len(documents) > 20 else "")
            raise NonFiniteError(
                f"step {self.step + 1}: {error}. Nothing was saved. The step read from\n  {shown}\n"
                "Lower the learning rate, or look at these documents (--preview shows chunks)."
            ) from None
        seconds = clock.stop()
        self.step += 1
        self.position = info.next_position
        self._now_complete()
        self._report(clock, loss, lr, info, info.tokens / seconds, last=self.step == total)
        return info

    def _report(self, clock: Clock, loss: float, lr: float, info: StepInfo, tokens_per_s: float, last: bool) -> None:
        logs = self.step % self.cadence.logging_steps == 0 or last
        prints = self.step % self.cadence.steps_per_print == 0 or last
        if not logs and not prints:
            return
        own = (adapter_norms(*self.adapter) if self.adapter and self.place.replica == 0 else {}, peak_memory())
        gathered: list[Any] | None = [None] * self.place.world if self.place.rank == 0 else None
        dist.gather_object(own, gathered)
        if logs:
            norms = {f"adapter_norm/{name}": norm for part in gathered or [] for name, norm in part[0].items()}
            self.metrics.log(self.step, {
                "train/loss": loss, "train/lr": lr, "train/grad_norm": self.optimizer.grad_norm,
                "train/tokens_per_s": tokens_per_s, "train/epoch": info.epochs_done, **norms,
            })  # fmt: skip
        if prints:
            memory = max((part[1] for part in gathered), default=0) if gathered else 0
            clock.line(self.step, loss, lr, self.optimizer.grad_norm, tokens_per_s, memory)

    def _after_step(self, info: StepInfo, last: bool) -> None:
        """What is due at this step: evaluation, saves of the adapter, checkpoints at the end of an epoch."""
        c = self.cadence
        if (c.eval_steps and self.step % c.eval_steps == 0) or (last and c.eval_after_last_step):
            self._evaluate(may_be_best=True)
        epoch = self.position.epoch
        if info.next_position.rows == 0 and (epoch % c.save_every_n_epochs == 0):
            self.save_artifact(self.run_dir / f"epoch{epoch}")
        if (c.save_steps and self.step % c.save_steps == 0) or last:
            self._save_step()
            if c.checkpoint_on_save and not last:
                self._checkpoint_now()
        if info.next_position.rows == 0 and c.save_checkpoint_on_epoch_end and not last:
            self._checkpoint_now()
        self._now_complete()

    def _boundary(self) -> bool:
        """Agree on what any process has learnt since the last step; True ends the run here."""
        wishes = [
            self.watcher.requested(),
            *(self._file_was_made(name) for name in SIGNAL_FILES),
            self._minutes_are_up(),
        ]
        agreed = torch.tensor(wishes, dtype=torch.int32, device=self.place.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        stop, save, save_quit, minutes = (bool(wish) for wish in agreed.tolist())
        if save or save_quit:
            self._save_step()
        if stop or save or save_quit or minutes:
            self._checkpoint_now()
        return stop or save_quit

    def _save_between_boundaries(self) -> None:
        """The watcher's way out of a step that does not end in time."""
        self.checkpoint()
        self._say_stopped(self.optimizer.completed_steps)

    def _stopped(self) -> int:
        self.watcher.detach()
        self.metrics.close()
        self._say_stopped(self.step)
        return EXIT_STOPPED

    def _say_stopped(self, step: int) -> None:
        say(f"stopped after step {step}; resume with\n  {self.resume_line}")

    def _finish(self) -> None:
        self._checkpoint_now()
        self.watcher.detach()
        self.metrics.close()
        say(f"done: {self.step} steps; what was trained is in {self.run_dir / f'step{self.step}'}")

    def _evaluate(self, may_be_best: bool) -> None:
        """All sets; the mean of their losses decides what is best so far."""
        if not self.evaluations:
            return
        results: dict[str, float] = {}
        for name, batches in self.evaluations.items():
            loss = evaluation.evaluate(self.engine, self.row_losses, batches, name)
            results |= {f"eval/{name}/loss": loss, f"eval/{name}/perplexity": evaluation.perplexity(loss)}
            say(
                f"step {self.step}  evaluation of {name}: loss {loss:.4f}, perplexity {evaluation.perplexity(loss):.2f}"
            )
        self.metrics.log(self.step, results)
        mean = sum(loss for tag, loss in results.items() if tag.endswith("/loss")) / len(self.evaluations)
        if math.isfinite(mean) and (self.best_loss is None or mean < self.best_loss):
            self.best_loss = mean
            if may_be_best:
                self.save_artifact(self.run_dir / "best_loss")

    def _save_step(self) -> None:
        if self.step != self._artifact_step:
            self.save_artifact(self.run_dir / f"step{self.step}")
            self._prune("step")
            self._artifact_step = self.step

    def _checkpoint_now(self) -> None:
        if self.step in self._saved_steps:
            return
        self.metrics.sync()
        began = time.monotonic()
        self.checkpoint()
        self._prune("global_step")
        self._last_checkpoint = time.monotonic()
        say(f"step {self.step}  checkpoint saved in {self._last_checkpoint - began:.1f} s")

    def _prune(self, prefix: str) -> None:
        if self.place.rank == 0:
            checkpoint.prune(self.run_dir, prefix, self.cadence.keep_states)

    def _now_complete(self) -> None:
        with UPDATE_LOCK:
            self.state.completed(self.step, self._progress(self.position))

    def _progress(self, position: Position) -> Progress:
        return Progress(position.epoch, position.rows, self.batches.order_hash(position.epoch), self.best_loss)

    def _file_was_made(self, name: str) -> bool:
        """A file named `save` or `save_quit` in the run's folder, removed when seen, as in qlora-pipe."""
        path = self.run_dir / name
        if self.place.rank != 0 or not path.exists():
            return False
        path.unlink()
        return True

    def _minutes_are_up(self) -> bool:
        minutes = self.cadence.checkpoint_every_n_minutes
        due = minutes is not None and time.monotonic() - self._last_checkpoint > minutes * 60
        return due and self.place.rank == 0 and not self.cadence.checkpoint_on_save
