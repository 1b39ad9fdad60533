"""deqlqr: train deep-equilibrium models by optimal control.

block -> fixed point -> linearise -> LQR problem -> Riccati -> steady state -> update -> check
"""

from deqlqr.adjoint import Costate, Implicit, Neumann
from deqlqr.blocks import ConvBlock, DenseBlock
from deqlqr.controls import Controls
from deqlqr.costate import StepCostate, costate_step
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.cyclic_riccati import CyclicDareSolution, solve_cyclic_dare
from deqlqr.cyclic_steady_state import CyclicSteadyState, cyclic_steady_state
from deqlqr.ddp import DDP, DDPReport
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
from deqlqr.fields import ConvGradientField, Field, GradientField, LayerField, Monotonicity
from deqlqr.finite_lqr import FiniteLQR
from deqlqr.finite_riccati import FiniteLQRSolution, solve_finite_lqr
from deqlqr.fixed_point import fixed_point
from deqlqr.gradient_step import GradientStep
from deqlqr.guard import Guard, Look
from deqlqr.hamiltonian import Classical, Integrator, Relativistic
from deqlqr.hamiltonian_descent import HamiltonianDescent, OuterMomentum
from deqlqr.input_cost import InputCost
from deqlqr.layer_inverse import NeumannInverse, Phase
from deqlqr.linear_solution import LinearSolution
from deqlqr.linearize import linearize
from deqlqr.lqr import LQR
from deqlqr.monitor import Monitor, Observation, jacobian_penalty, jacobian_radius
from deqlqr.monotone import ConvMonotoneBlock, MonotoneBlock
from deqlqr.msa import MSA, MSAReport
from deqlqr.newton_krylov import NewtonKrylov
from deqlqr.optim import ImplicitNGD, StepReport
from deqlqr.random_fields import ControlledODE, RandomFieldBlock, RandomFields
from deqlqr.resolvent import Resolvent
from deqlqr.riccati import DareSolution, solve_dare
from deqlqr.routes import Cyclic, Dare, Kronecker, Krylov, Output, Riccati, Route, Sampled
from deqlqr.runge_kutta import (
    ConvGradientBlock,
    GradientBlock,
    RungeKuttaBlock,
    RungeKuttaNet,
    runge_kutta_step,
)
from deqlqr.search import Doubling
from deqlqr.solution import (
    ConvergenceError,
    DareResult,
    FiniteResult,
    FixedPointResult,
    ResultCode,
    SteinResult,
)
from deqlqr.solver import FixedPointSolution, Solver
from deqlqr.solvers import Anderson, Broyden, Picard
from deqlqr.spectral import spectral_radius
from deqlqr.spectral_bound import (
    SpectralBound,
    SpectralProjection,
    SpectralSphere,
    bound_norm,
    operator_norm,
)
from deqlqr.steady_state import SteadyState, static_step, steady_state
from deqlqr.stein import (
    CyclicSteinSolution,
    SteinSolution,
    solve_cyclic_stein,
    solve_stein,
)
from deqlqr.stiefel import Stiefel, orthonormal
from deqlqr.sweeps import LayerDamping, Swept, sweep_chain, sweep_cycle
from deqlqr.tableau import Tableau, make_tableau
from deqlqr.torchdeq_solver import TorchDEQ
from deqlqr.unrolled import Unrolled, unrolled

__version__ = "0.1.0"

__all__ = [
    # blocks
    "DenseBlock",
    "ConvBlock",
    "GradientBlock",
    "ConvGradientBlock",
    "MonotoneBlock",
    "ConvMonotoneBlock",
    "RandomFieldBlock",
    "RungeKuttaBlock",
    # vector fields, and explicit networks along them
    "Field",
    "Monotonicity",
    "GradientField",
    "ConvGradientField",
    "LayerField",
    "RandomFields",
    "Tableau",
    "make_tableau",
    "runge_kutta_step",
    "costate_step",
    "StepCostate",
    "RungeKuttaNet",
    "ControlledODE",
    # parametrisations
    "bound_norm",
    "SpectralBound",
    "SpectralProjection",
    "SpectralSphere",
    "operator_norm",
    "orthonormal",
    "Stiefel",
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
    "FiniteLQR",
    "InputCost",
    # Riccati
    "solve_dare",
    "Doubling",
    "DareSolution",
    "spectral_radius",
    "solve_cyclic_dare",
    "CyclicDareSolution",
    "solve_finite_lqr",
    "FiniteLQRSolution",
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
    "Riccati",
    "NeumannInverse",
    "LayerDamping",
    "Output",
    "Sampled",
    "Krylov",
    "Kronecker",
    "StepReport",
    "GradientStep",
    "DDP",
    "DDPReport",
    "MSA",
    "MSAReport",
    "HamiltonianDescent",
    "OuterMomentum",
    "Classical",
    "Relativistic",
    "Integrator",
    "Guard",
    "Look",
    "unrolled",
    "Unrolled",
    # check
    "check_equivalence",
    "EquivalenceReport",
    "EquivalenceRow",
    # outcome
    "ResultCode",
    "FixedPointResult",
    "DareResult",
    "FiniteResult",
    "SteinResult",
    "ConvergenceError",
]
