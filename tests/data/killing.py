"""python -m tests.data.killing HOW SEED MODEL SOURCE OUTPUT PROCESSES: a preparation that is killed again and again.

Prints how many of its runs were killed. Processes are forked before anything is computed: importing takes longer than
the preparation, whose encoders are replaced by quick ones.
"""

import os
import random
import signal
import sys
import time

from sdv_jax.checkpoints import model_folder
from sdv_jax.data import prepare
from sdv_jax.data.encoding import Encoders
from tests.data import sets

SLOWLY = 0.1  # seconds per batch, so that kills find work to interrupt
LONGEST = 0.6  # seconds until a kill: a run begins, and does a unit or two
RANDOM_KILLS = 10  # then a run may end


def main(how, seed, model, source, output, processes):
    traits = model_folder.about(model).traits
    Encoders.load = lambda *_, **__: sets.fake_encoders(traits, SLOWLY if how == "random" else 0.0)
    rng, killed = random.Random(int(seed)), 0
    for attempt in range(200):
        children = [start(how, attempt, model, source, output, i, int(processes)) for i in range(int(processes))]
        if how == "random" and killed < RANDOM_KILLS:
            for child in children:
                time.sleep(rng.random() * LONGEST)
                os.kill(child, signal.SIGKILL)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(ends) <= {0, -signal.SIGKILL}, ends
        killed += sum(end != 0 for end in ends)
        if not any(ends):
            print(killed)
            return
    raise SystemExit("never finished")


def start(how, attempt, model, source, output, process, processes):
    child = os.fork()
    if child:
        return child
    try:
        if how == "replace":
            die_at_replacement(attempt)
        config = sets.config(model, source, output)
        prepare.prepare(config, process=(process, processes), progress=False)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def die_at_replacement(number):
    """Kills this process before or after the call of that number by which a file appears under its own name."""
    replace, calls = os.replace, iter(range(10**6))

    def deadly(*paths):
        call = next(calls)
        if call == number // 2 and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if call == number // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


if __name__ == "__main__":
    main(*sys.argv[1:])
