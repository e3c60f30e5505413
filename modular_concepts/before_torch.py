"""What must be in the environment before torch loads OpenMP: threads that wait without spinning.

A step of a small network has thousands of short parallel regions, and at the end of each the threads wait for the last
of them.  GNU OpenMP waits spinning for some milliseconds.  Where other programs want the cores too, a thread that spins
uses up the time in which the one that it waits for could run, at every region anew.  Waiting asleep costs little on an
idle machine: see `bench/busy.py`.  Who has said how threads wait is left alone.
"""

import os

SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

if not any(name in os.environ for name in SAID):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
