"""Contract tests for plug-ins: call them from a test of your own. The same ones run on every algorithm that is shipped.

    check_loss(loss)                    masks, one number a token, rows on their own, finite, pickles
    check_partition(loss)               one gradient for every split into ranks and micro-batches, and in any row order
    check_partition(Algorithm, config)  one gradient, and metrics, of a whole step of an algorithm for every split
    check_algorithm(Algorithm, config)  that, row order, masked junk, finiteness, pickling, state of the next step
    check_reward(function, samples)     a reward's answers

Each raises `ContractViolation`, an AssertionError that says what was found, or returns None.
"""

from hybridflow.testing.algorithms import check_algorithm, check_partition
from hybridflow.testing.losses import check_loss
from hybridflow.testing.rewards import check_reward
from hybridflow.testing.violation import ContractViolation

__all__ = ["ContractViolation", "check_algorithm", "check_loss", "check_partition", "check_reward"]
