"""A rank's double, for what happens around ranks: `actor.py -m MODULE ARGUMENTS...`; whatever is no rank is run as it is.

ACT says what each attempt does: CODE:STEP or CODE:STEP@NODEID, one word an attempt. A checkpoint of STEP is committed, then
the ranks (or those of that node) end with CODE, or by the signal -CODE; `wait` waits for a signal and ends with 75.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path


def act(word: str, folder: Path, rank: int) -> int:
    code, _, rest = word.partition(":")
    step, _, node = rest.partition("@")
    if rank == 0 and int(step or 0):
        target = folder / "checkpoints" / f"step-{int(step):08d}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "manifest.json").write_text(json.dumps({"step": int(step)}))
    print(f"rank {rank}: {word}", flush=True)
    if code == "wait":
        signal.sigwait([signal.SIGUSR2, signal.SIGTERM])
        return 75
    if node and os.environ["SLURM_NODEID"] != node:
        time.sleep(60)
    if int(code) < 0:
        os.kill(os.getpid(), -int(code))
    return int(code)


def main() -> int:
    module = sys.argv[2]
    if module != "nlscale.cli":
        sys.argv = [module, *sys.argv[3:]]
        runpy.run_module(module, run_name="__main__")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
    logs, rank = Path(os.environ["NLSCALE_LOGS"]), int(os.environ["SLURM_PROCID"])
    words = os.environ["ACT"].split()
    attempt = sum(1 for _ in logs.parent.iterdir())
    word = words[min(attempt, len(words)) - 1]
    if not word.startswith("wait"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2, signal.SIGTERM])
    code = act(word, logs.parents[1], rank)
    if code in (75, 78, 93) and rank == 0:
        said = {"code": code, "rank": rank, "host": "here", "message": f"as asked: {word}", "hosts": []}
        (logs / "exit.json").write_text(json.dumps(said))
    return code


sys.exit(main())
