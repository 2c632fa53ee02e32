"""The interpreter of ranks that something happens to: `faulty.py -m MODULE ARGUMENTS...`, and FAULT says what.

sleep SECONDS: every step takes so much longer. raise STEP: an exception there. kill STEP NODE: SIGKILL there, on that node.
"""

import os
import runpy
import signal
import sys
import time
from typing import Any


def at_step(step: int, what: str, *words: str) -> None:
    if what == "sleep":
        time.sleep(float(words[0]))
    elif what == "raise" and step == int(words[0]):
        raise RuntimeError(f"a fault at step {step}")
    elif what == "kill" and step == int(words[0]) and os.environ.get("SLURMD_NODENAME") == words[1]:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    module, fault = sys.argv[2], os.environ["FAULT"].split()
    sys.argv = [module, *sys.argv[3:]]
    if module == "nlscale.cli":
        from nlscale.runtime.watch import Watch

        with Watch() as watch:  # as a rank does from its first moment: what is asked for meanwhile is asked again
            from nlscale.train import loop

            plain = loop.train_step

            def step(state: Any, *rest: Any) -> Any:
                if watch.asked:
                    os.kill(os.getpid(), signal.SIGUSR2)
                at_step(state.step + 1, *fault)
                return plain(state, *rest)

            loop.train_step = step
    runpy.run_module(module, run_name="__main__")


main()
