"""The benchmark suite: ``scripts/bench``. How to read what it prints is in ``docs/performance.md``.

Invariants:

* Every figure is measured in the same run as what it is held against: contenders take turns, round by round, and
  what is printed are medians over the rounds, of ratios within a round where two are compared.
* CPU time stands beside wall time. It is what other programs on the machine disturb least, so goals are on CPU time
  wherever they are about cost and not about a wait.
* Each benchmark is run at three sizes, and says how its cost grows with them.
"""
