"""A process of a pipeline that runs the product's trainer several times in a row, stopping and resuming on the way.

`deepspeed --num_gpus N tests/workers/resume_worker.py PLAN.json`: the plan is a list of {config, overrides, resume, stop_after,
fault}. Each is run to its end or to a stop after `stop_after` steps, by the same `.stop` file a signal leaves; the
run's folder is appended to PLAN.json.runs. Faults: 'die_in_save:<step>' kills rank 1 half way through its shard,
'hang:<step>' lets the last rank sleep in that step after a SIGTERM to itself.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.training.data import specs
from pipeline.training.data.read import read_data
from pipeline.training.run.stop import Watcher, hold_signals
from pipeline.training.start import resolve

HELD = hold_signals()

from safetensors.torch import save_file  # noqa: E402

from pipeline.config import loading  # noqa: E402
from pipeline.data import tokenizer  # noqa: E402
from pipeline.processes import launched_by  # noqa: E402
from pipeline.training.checkpoint import commit as checkpoint  # noqa: E402
from pipeline.training.engine import engine  # noqa: E402
from pipeline.training.run import assemble, folder, stop  # noqa: E402


def main() -> None:
    plan_path = Path(sys.argv[-1])
    watcher = Watcher(HELD)
    codes, runs = [], []
    for case in json.loads(plan_path.read_text()):
        config = loading.load(case["config"], None, case.get("overrides", []))
        rendezvous = plan_path.resolve().with_name(f".rendezvous-{launched_by()}")
        place = engine.initialise(config.pipeline_stages, rendezvous, config.use_column_major_topology)
        resume = case.get("resume")
        resume = runs[resume] if isinstance(resume, int) else resume
        found = folder.find_checkpoint(Path(config.output_dir), resume or False)
        model = resolve.resolve(config)
        data = read_data(specs.data_of(config), tokenizer.load(config.model))
        run = assemble.trainer(config, model, data, place, watcher, found, ["train.py", "--config", case["config"]])
        arrange(case, run, place)
        codes.append(run.run())
        runs.append(str(run.saver.run_dir))
        (run.saver.run_dir / stop.STOP_FILE).unlink(missing_ok=True)
        if run.folder.lock:
            run.folder.lock.close()  # this process may resume its own run
        watcher._since = None
    if place.rank == 0:
        plan_path.with_suffix(".runs.json").write_text(json.dumps({"codes": codes, "runs": runs}))
    engine.shutdown()


def arrange(case: dict[str, Any], run: Any, place: engine.Place) -> None:
    """Make happen what the case says, from inside the steps."""
    after_step = run._after_step

    def step_done(last: bool) -> None:
        after_step(last)
        if run.step == case.get("stop_after"):
            (run.saver.run_dir / stop.STOP_FILE).touch()

    run._after_step = step_done
    kind, _, step = case.get("fault", "").partition(":")
    if kind == "die_in_save" and place.rank == 1:
        write = checkpoint._write_shard

        def half(staging: Path, rank: int, at: int, tensors: Any, facts: Any) -> None:
            if at != int(step):
                write(staging, rank, at, tensors, facts)
                return
            shard = staging / f"rank-{rank}.safetensors"
            save_file(tensors, shard)
            os.truncate(shard, shard.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._write_shard = half
    if kind == "hang":
        stop.BOUNDARY_GRACE_S = 1.0
        forward = run.engine.module.forward

        def slow(*arguments: Any, **named: Any) -> Any:
            if run.step == int(step) - 1 and place.rank == place.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            return forward(*arguments, **named)

        run.engine.module.forward = slow


if __name__ == "__main__":
    main()
