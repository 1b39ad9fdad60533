"""deqlqr: train deep-equilibrium models by optimal control.

block -> fixed point -> linearise -> LQR problem -> Riccati -> steady state -> update -> check
"""

from deqlqr.adjoint import Costate, Implicit, Neumann
from deqlqr.blocks import ConvBlock, DenseBlock
from deqlqr.controls import Controls
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.cyclic_riccati import CyclicDareSolution, solve_cyclic_dare
from deqlqr.cyclic_steady_state import CyclicSteadyState, cyclic_steady_state
from deqlqr.deq import DEQ
from deqlqr.divergence import (
    CategoricalKL,
    Custom,
    Divergence,
    Euclidean,
    GaussianKL,
    Newton,
    OutputDivergence,
)
from deqlqr.equivalence import EquivalenceReport, EquivalenceRow, check_equivalence
from deqlqr.fallback import Fallback
from deqlqr.fixed_point import fixed_point
from deqlqr.input_cost import InputCost
from deqlqr.layer_inverse import NeumannInverse, Phase
from deqlqr.linearize import linearize
from deqlqr.lqr import LQR
from deqlqr.monitor import Monitor, Observation, jacobian_penalty, jacobian_radius
from deqlqr.newton_krylov import NewtonKrylov
from deqlqr.optim import ImplicitNGD, StepReport
from deqlqr.resolvent import LinearSolution, Resolvent
from deqlqr.riccati import DareSolution, solve_dare
from deqlqr.routes import Cyclic, Dare, Kronecker, Krylov, Output, Route, Sampled
from deqlqr.search import Doubling
from deqlqr.solution import (
    ConvergenceError,
    DareResult,
    FixedPointResult,
    ResultCode,
    SteinResult,
)
from deqlqr.solver import FixedPointSolution, Solver
from deqlqr.solvers import Anderson, Broyden, Picard
from deqlqr.spectral import spectral_radius
from deqlqr.steady_state import SteadyState, static_step, steady_state
from deqlqr.stein import (
    CyclicSteinSolution,
    SteinSolution,
    solve_cyclic_stein,
    solve_stein,
)
from deqlqr.sweeps import LayerDamping, Swept, sweep_chain, sweep_cycle
from deqlqr.torchdeq_solver import TorchDEQ

__version__ = "0.1.0"

__all__ = [
    # blocks
    "DenseBlock",
    "ConvBlock",
    # fixed point
    "fixed_point",
    "Solver",
    "Anderson",
    "Picard",
    "Broyden",
    "NewtonKrylov",
    "Fallback",
    "TorchDEQ",
    "FixedPointSolution",
    # layer
    "DEQ",
    "Implicit",
    "Costate",
    "Neumann",
    "Resolvent",
    "LinearSolution",
    "Monitor",
    "Observation",
    "jacobian_radius",
    "jacobian_penalty",
    # divergence
    "Divergence",
    "OutputDivergence",
    "Euclidean",
    "CategoricalKL",
    "GaussianKL",
    "Newton",
    "Custom",
    # linearise
    "linearize",
    "Controls",
    # LQR problem
    "LQR",
    "CyclicLQR",
    "InputCost",
    # Riccati
    "solve_dare",
    "Doubling",
    "DareSolution",
    "spectral_radius",
    "solve_cyclic_dare",
    "CyclicDareSolution",
    "solve_stein",
    "SteinSolution",
    "solve_cyclic_stein",
    "CyclicSteinSolution",
    # steady state
    "steady_state",
    "static_step",
    "SteadyState",
    "cyclic_steady_state",
    "CyclicSteadyState",
    "sweep_cycle",
    "sweep_chain",
    "Phase",
    "Swept",
    # update
    "ImplicitNGD",
    "Route",
    "Dare",
    "Cyclic",
    "NeumannInverse",
    "LayerDamping",
    "Output",
    "Sampled",
    "Krylov",
    "Kronecker",
    "StepReport",
    # check
    "check_equivalence",
    "EquivalenceReport",
    "EquivalenceRow",
    # outcome
    "ResultCode",
    "FixedPointResult",
    "DareResult",
    "SteinResult",
    "ConvergenceError",
]
