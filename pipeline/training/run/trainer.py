"""The loop: steps, evaluations, saves, stops.

Takes everything assembled; runs from a position in the data to the end of the run or a stop. Every process runs the
same loop; what one learns by itself (a signal, a file, the clock) is agreed on at the step boundary.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from pipeline.console import EXIT_DONE, EXIT_STOPPED, log, warn
from pipeline.data.batches import EvaluationBatches, StepInfo
from pipeline.data.microbatch import MicroBatch
from pipeline.objectives.objective import Objective
from pipeline.objectives.preference import StepTotals
from pipeline.publishing.report.beside import Reports
from pipeline.training.checkpoint.saver import Saver
from pipeline.training.checkpoint.state import Progress, RunState
from pipeline.training.data.batches import TrainBatches
from pipeline.training.engine import evaluate, prefetch, wires
from pipeline.training.engine.engine import Place, held_tensors
from pipeline.training.engine.on_policy import Negatives
from pipeline.training.engine.samples import Samples
from pipeline.training.metrics import Clock, Metrics, StepMemory, peak_memory
from pipeline.training.optim.pipeline_optimizer import NonFiniteError, PipelineOptimizer
from pipeline.training.run.folder import RunFolder
from pipeline.training.run.stop import STOP_FILE, Watcher
from pipeline.training.stage import unmoved
from pipeline.training.stage.unmoved import Unmoved
from pipeline.training.start.resolved import Intervals
from pipeline.training.start.times import StartTimes
from pipeline.training.step_measures import StepTimes

SIGNAL_FILES = ("save", "save_quit")


class Measuring(Protocol):
    """What notes something of a step's micro-batches on its stage: routers their loads, taps their cosines."""

    def begin_step(self) -> None:
        """What was noted before is of another step."""

    def measured(self) -> dict[str, float]:
        """Of the step so far, by tag; over replicas their mean is logged."""


@dataclass
class Trainer:
    """One run on one process, which goes on from `progress`. `learning_rate(step, total)` is the config's schedule."""

    engine: PipelineEngine
    place: Place
    optimizer: PipelineOptimizer
    batches: TrainBatches
    evaluations: dict[str, EvaluationBatches]
    objective: Objective
    learning_rate: Callable[[int, int], float]
    adapter_norms: Callable[[], dict[str, float]] | None  # of this stage's adapter, by module
    measuring: Sequence[Measuring]  # of a step, on this stage
    step_totals: StepTotals | None  # what preference training measures on the last stage
    unmoved: Unmoved | None  # of this stage's adapter
    intervals: Intervals
    epochs: int | None  # the run ends after so many, or after max_steps
    max_steps: int | None
    state: RunState
    folder: RunFolder  # its lock is held as long as this is
    saver: Saver
    metrics: Metrics
    samples: Samples | None
    negatives: Negatives | None
    reports: Reports
    step_times: StepTimes
    memory: StepMemory
    watcher: Watcher
    resume_line: str
    progress: Progress
    first_step_done: Callable[[], object]  # says what only a step shows
    outcome: Callable[[float, int], None]  # says what was planned and what became of it: a step's seconds, peak bytes
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext  # profiler.StepProfiler's
    times: StartTimes = field(default_factory=StartTimes)  # of the start, said after the first step

    @property
    def step(self) -> int:
        """The last completed one."""
        return self.progress.step

    def run(self) -> int:
        """To the end of the run (exit code 0) or to a stop (75)."""
        self._completed(self.progress)
        self.watcher.attach(self.saver.run_dir, self.save_between_boundaries, self.resume_line, self.saver.kept_on)
        total = self.total_steps()
        if self.step == 0 and self.intervals.eval_before_first_step:
            self._evaluate(may_be_best=False)
            self.times.ended("evaluation")
        if self.step == 0 and self._sample(last=False):
            self.times.ended("samples")
        if not self.progress.settled:
            self._after_step(last=self.step == total)
        clock = Clock(total)
        while self.step < total and not self._patience_is_over():
            with self.watcher.phase("step", self.step + 1), self.around_step(self.step + 1):
                self._train_step(clock, total)
            if clock.steps == 1:
                self.times.ended("first step")
                self.times.say()
                self.first_step_done()
            if clock.steps == unmoved.AFTER_STEPS:
                self._say_unmoved(clock.steps)
            self._after_step(last=self.step == total)
            self.reports.step_done()
            if self._boundary():
                return self._stopped()
        if 0 < clock.steps < unmoved.AFTER_STEPS:  # it ends before, by its length or its patience
            self._say_unmoved(clock.steps)
        self._finish()
        if clock.mean_s:
            self.outcome(clock.mean_s, self.memory.peak())
        return EXIT_DONE

    def total_steps(self) -> int:
        """Steps of the whole run: those done, and those from here to the end of the last epoch or to max_steps."""
        most = self.max_steps
        if self.epochs is None:
            return most or self.step
        left = None if most is None else max(0, most - self.step)
        steps = self.step + self.batches.steps_to_come(self.progress.position, self.epochs, left)
        return min(steps, most or steps)

    def _train_step(self, clock: Clock, total: int) -> None:
        """One optimizer step; NonFiniteError names the documents it came from."""
        clock.start()
        with self.step_times.part("data"):
            micro_batches, info = self._read()
        lr = self.learning_rate(self.step, total)
        self.optimizer.set_lr(lr)
        order = self.batches.order_hash(info.next_position.epoch)
        ahead = self.progress.after_step(info.next_position, order, info.tokens)
        self.state.ahead(ahead)
        for one in self.measuring:
            one.begin_step()
        if self.step_totals:
            self.step_totals.begin(self.step / total, self._is_logged(self.step + 1, total))
        try:
            inputs = prefetch.ahead(wires.pack_all(micro_batches, self.objective), self.place.device)
            with self.step_times.step():
                loss = float(self.engine.train_batch(inputs))
            if not math.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss}")
        except NonFiniteError as error:
            documents = self.batches.documents(info.rows)
            shown = "\n  ".join(documents[:20]) + (f"\n  and {len(documents) - 20} more" if len(documents) > 20 else "")
            raise NonFiniteError(
                f"step {self.step + 1}: {error}. Nothing of it was saved. The step read from\n  {shown}\n"
                "Lower the learning rate, or look at these documents (--preview N prints rows as the model reads them)."
            ) from None
        seconds = clock.stop()
        if clock.steps == 1:
            self.memory.reset(held_tensors(self.engine, self.optimizer))
        self._completed(ahead)
        self._report(clock, loss, lr, info, info.tokens / seconds, last=self.step == total)

    def _read(self) -> tuple[list[MicroBatch], StepInfo]:
        """The next step's micro-batches, for which the model may have to give answers first."""
        position, stores = self.progress.position, None
        if self.negatives is not None:
            rows = self.batches.info(position).rows
            stores = self.negatives.stores(self.batches.stores, rows, self.step + 1)
        return self.batches.step(position, stores)

    def _is_logged(self, step: int, total: int) -> bool:
        return step % self.intervals.logging_steps == 0 or step == total

    def _say_unmoved(self, steps: int) -> None:
        """Warn of adapter tensors that this launch's steps have not changed. All processes must come here."""
        if self.unmoved is None:
            return
        gathered: list[Any] = [None] * self.place.world
        dist.all_gather_object(
            gathered, (self.unmoved.names(), self.unmoved.count) if self.place.replica == 0 else ([], 0)
        )
        if names := [name for own, _ in gathered for name in own]:
            warn(unmoved.described(names, sum(count for _, count in gathered), steps))

    def _report(self, clock: Clock, loss: float, lr: float, info: StepInfo, tokens_per_s: float, last: bool) -> None:
        logs = self.step % self.intervals.logging_steps == 0 or last
        prints = self.step % self.intervals.steps_per_print == 0 or last
        if not logs and not prints:
            return
        own = (
            self.adapter_norms() if self.adapter_norms and self.place.replica == 0 else {},
            peak_memory(),
            {tag: value for one in self.measuring for tag, value in one.measured().items()},
            self.step_totals.taken() if self.step_totals else {},
            self.step_times.taken() if logs else {},
        )
        gathered: list[Any] | None = [None] * self.place.world if self.place.rank == 0 else None
        dist.gather_object(own, gathered)
        if logs:
            norms = {f"adapter_norm/{name}": norm for part in gathered or [] for name, norm in part[0].items()}
            self.metrics.log(
                self.step,
                {
                    "train/loss": loss,
                    "train/lr": lr,
                    "train/grad_norm": self.optimizer.grad_norm,
                    "train/tokens_per_s": tokens_per_s,
                    f"train/{self.batches.unit}": info.epochs_done,
                    "train/tokens": self.progress.tokens,
                    **_means([part[2] for part in gathered or []]),
                    **self._measured([part[3] for part in gathered or []]),
                    **(self.negatives.measured() if self.negatives else {}),
                    **norms,
                    **_by_process(gathered or []),
                },
            )
        if prints:
            memory = max((part[1] for part in gathered), default=0) if gathered else 0
            clock.line(self.step, loss, lr, self.optimizer.grad_norm, tokens_per_s, memory)

    def _measured(self, parts: list[dict[str, float]]) -> dict[str, float]:
        """What the objective says of a step, from sums over each replica's micro-batches; 'loss' is known already."""
        totals: dict[str, float] = {}
        for part in parts:
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        means = self.objective.means(totals, 0) if totals else {}
        return {f"train/{name}": value for name, value in means.items() if name != "loss"}

    def _after_step(self, last: bool) -> None:
        """What is due at this step: evaluation, saves of what is trained, samples, checkpoints at the end of an epoch."""
        c, epoch, epoch_ended = self.intervals, self.progress.epoch, self.progress.rows == 0
        if (c.eval_steps and self.step % c.eval_steps == 0) or (last and c.eval_after_last_step):
            self._evaluate(may_be_best=True)
        if c.save_every_n_epochs and epoch_ended and epoch % c.save_every_n_epochs == 0:
            self._save_trained(f"epoch{epoch}")
        last = last or self._patience_is_over()
        saves = bool(c.save_steps and self.step % c.save_steps == 0)
        if saves or last:
            self._save_trained()
        self._sample(last)
        self._completed(self.progress._replace(settled=True))
        if not last and ((saves and c.checkpoint_on_save) or (epoch_ended and c.save_checkpoint_on_epoch_end)):
            self._checkpoint()

    def _boundary(self) -> bool:
        """Agree on what any process has learnt since the last step; True ends the run here."""
        wishes = [
            self.watcher.requested(),
            *(self._file_was_made(name) for name in SIGNAL_FILES),
            self._minutes_are_up(),
        ]
        agreed = torch.tensor(wishes, dtype=torch.int32, device=self.place.device)
        with self.watcher.phase("the end of a step", self.step):
            self.watcher.doing("waiting at its end", True)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        stop, save, save_quit, minutes = (bool(wish) for wish in agreed.tolist())
        if save or save_quit:
            self._save_trained()
        if stop or save or save_quit or minutes:
            self._checkpoint()
        return stop or save_quit

    def save_between_boundaries(self) -> None:
        """The way out of a step that does not end: the last completed step is saved. All processes must come here."""
        self.saver.checkpoint()
        self._say_stopped(self.optimizer.completed_steps)

    def _stopped(self) -> int:
        with suppress(OSError):  # also where another file asked for it: no launcher is to restart the run
            (self.saver.run_dir / STOP_FILE).touch()
        self.watcher.detach()
        self.metrics.close()
        self._say_stopped(self.step)
        return EXIT_STOPPED

    def _say_stopped(self, step: int) -> None:
        log(f"stopped after step {step}; resume with\n  {self.resume_line}")

    def _finish(self) -> None:
        self._save_trained()
        self._checkpoint()
        self.watcher.detach()
        self.metrics.close()
        if self._patience_is_over():
            log(
                f"ended early: {self.progress.waited} evaluations in a row were not clearly better than "
                f"{self.progress.waited_from:.4f} (early_stopping_patience)"
            )
        log(f"done: {self.step} steps; what was trained is in {self.saver.run_dir / f'step{self.step}'}")

    def _evaluate(self, may_be_best: bool) -> None:
        """All sets; the mean of their losses decides what is best so far."""
        if not self.evaluations:
            return
        results: dict[str, float] = {}
        for name, batches in self.evaluations.items():
            with self.watcher.phase(f"evaluating {name}", self.step), self.step_times.part("evaluation"):
                measured = evaluate.evaluate(self.engine, self.objective, batches, name)
            loss = measured["loss"]
            if not math.isfinite(loss):
                raise NonFiniteError(f"step {self.step}: the loss of {name} is {loss}. Nothing of this step was saved.")
            if self.step_totals is None:
                measured["perplexity"] = evaluate.perplexity(loss)
            results |= {f"eval/{name}/{measure}": value for measure, value in measured.items()}
            log(f"step {self.step}  evaluation of {name}: {_shown(measured)}")
        self.metrics.log(self.step, results)
        mean = sum(results[f"eval/{name}/loss"] for name in self.evaluations) / len(self.evaluations)
        best = self.progress.best_loss
        self.progress = self.progress.evaluated(mean, self.intervals.early_stopping_min_delta)
        if may_be_best and (best is None or mean < best):
            self._save_trained("best_loss")

    def _patience_is_over(self) -> bool:
        """Whether so many evaluations in a row were no better that the run ends before its last step."""
        patience = self.intervals.early_stopping_patience
        return patience is not None and self.progress.waited >= patience

    def _sample(self, last: bool) -> bool:
        """Have the model say something, if that is due at this step; whether it was."""
        if self.samples is None or not self.samples.due(self.step, last):
            return False
        with self.watcher.phase("writing samples", self.step), self.step_times.part("samples"):
            self.samples.write(self.step)
        return True

    def _save_trained(self, name: str | None = None) -> None:
        """What is trained, as step<N>/ or under a name of its own."""
        with self.watcher.phase("saving what is trained", self.step), self.step_times.part("saves"):
            self.saver.trained(name) if name else self.saver.trained_at(self.step)

    def _checkpoint(self) -> None:
        with self.watcher.phase("writing a checkpoint", self.step), self.step_times.part("saves"):
            self.saver.checkpoint_and_prune()

    def _completed(self, progress: Progress) -> None:
        """The run is at `progress`; a checkpoint from here on says so."""
        self.progress = progress
        self.state.completed(progress)

    def _file_was_made(self, name: str) -> bool:
        """A file named `save` or `save_quit` in the run's folder, removed when seen, as in qlora-pipe."""
        path = self.saver.run_dir / name
        if self.place.rank != 0 or not path.exists():
            return False
        path.unlink()
        return True

    def _minutes_are_up(self) -> bool:
        minutes = self.intervals.checkpoint_every_n_minutes
        due = minutes is not None and time.monotonic() - self.saver.last_checkpoint > minutes * 60
        return due and self.place.rank == 0 and not self.intervals.checkpoint_on_save


def _by_process(gathered: list[Any]) -> dict[str, float]:
    """Of each process its peak memory and where its time went."""
    values: dict[str, float] = {}
    for rank, part in enumerate(gathered):
        values[f"memory_gib/rank{rank}"] = part[1] / 2**30
        values |= {f"seconds/rank{rank}/{what}": seconds for what, seconds in part[4].items()}
    return values


def _means(parts: list[dict[str, float]]) -> dict[str, float]:
    """Of numbers that several replicas have of the same thing, the mean; all in one order."""
    tags = sorted({tag for part in parts for tag in part})
    return {tag: sum(values) / len(values) for tag in tags if (values := [part[tag] for part in parts if tag in part])}


def _shown(measured: dict[str, float]) -> str:
    """Of an evaluation, on one line: what says most."""
    digits = {"loss": 4, "perplexity": 2, "rewards/accuracies": 3, "rewards/margins": 4, "kl": 4}
    return ", ".join(f"{name} {measured[name]:.{places}f}" for name, places in digits.items() if name in measured)
