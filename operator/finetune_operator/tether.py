"""`python -m finetune_operator.tether PID COMMAND...`: becomes COMMAND, which the kernel kills when PID, its parent,
dies in whatever way. Linux only; elsewhere it becomes COMMAND and no more. It replaces a preexec_fn, which is unsafe
in a process with threads.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl(2); it holds across execve(2)."""


def main(arguments: Sequence[str]) -> None:
    parent, *command = arguments
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before the call
            sys.exit(128 + signal.SIGKILL)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
