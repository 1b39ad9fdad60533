"""Explicit Runge-Kutta methods as tables that check themselves.

A step of z' = v(z) with the coefficients a (s, s), b (s,) and the step size h is

    (RK1)  Y_i = z + h sum_j a_ij v(Y_j),    z+ = z + h sum_i b_i v(Y_i)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from deqlqr._checks import choice

Number = Fraction | float

_EXACT = 1e-12  # to which the order conditions must hold where coefficients are floats


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method.

    Attributes:
        a: s rows of s coefficients, zero on and above the diagonal.
        b: The s weights.
        order: Order of convergence claimed, 1 to 4; the order conditions up to it are checked.
        name: What to call it.

    Raises:
        ValueError: If the shapes do not fit, a is not strictly lower triangular, the order is not 1
            to 4, or a condition of the order claimed does not hold.

    References:
        E. Hairer, S. Norsett and G. Wanner (1993). Solving ordinary differential equations I,
        section II.2. doi:10.1007/978-3-540-78862-1.

    Example:
        >>> midpoint = Tableau(((0, 0), (0.5, 0)), (0, 1), order=2, name="midpoint")
        >>> midpoint.c
        (0, 0.5)
        >>> make_tableau("kutta4").stages
        4
    """

    a: tuple[tuple[Number, ...], ...]
    b: tuple[Number, ...]
    order: int
    name: str

    def __post_init__(self) -> None:
        """Check the table.

        Raises:
            ValueError: If it is none of an explicit method of the order claimed.
        """
        s = len(self.b)
        if s == 0 or len(self.a) != s or any(len(row) != s for row in self.a):
            raise ValueError(
                f"a must have as many rows and columns as b has weights, at least 1, got rows of "
                f"{[len(row) for row in self.a]} and {s} weights."
            )
        if any(self.a[i][j] != 0 for i in range(s) for j in range(i, s)):
            raise ValueError(
                f"a must be zero on and above its diagonal (explicit methods only), got {self.a}."
            )
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order must be 1, 2, 3 or 4, got {self.order!r}.")
        for order, condition, got, wanted in self._conditions():
            # Not "> _EXACT": a NaN must fail.
            if order <= self.order and not abs(float(got - wanted)) <= _EXACT:
                raise ValueError(
                    f"order {self.order} needs {condition} = {wanted}, got {got} ({self.name})."
                )

    @property
    def stages(self) -> int:
        """Number s of stages."""
        return len(self.b)

    @property
    def c(self) -> tuple[Number, ...]:
        """The abscissae c_i = sum_j a_ij."""
        return tuple(sum(row) for row in self.a)

    @property
    def contractivity_radius(self) -> float:
        """The r for which a step h <= 2 r beta brings no two states further apart.

        That holds for every field with <dv, dz> <= -beta |dv|^2, where dz, dv are differences of
        states and of the field at them. With B = diag(b) differences of (RK1) satisfy

            (RK2)  |dz+|^2 = |dz|^2 + 2 h sum_i b_i <dv_i, dY_i> - h^2 sum_ij M_ij <dv_i, dv_j>,
                   M = B a + a' B - b b',    1 / r = -(smallest eigenvalue of B^-1/2 M B^-1/2)

        and so -M <= B / r gives |dz+|^2 <= |dz|^2 - h (2 beta - h / r) sum_i b_i |dv_i|^2. Where
        the field is measured by <dv, dz> <= nu |dv|^2, nu < 0, the bound reads h <= -2 r nu, twice
        what is sometimes quoted. r is 1 for the methods of Euler, where the bound is sharp, Heun,
        and Kutta (order 4), and 1/2 for Kutta's of order 3.

        Raises:
            ValueError: If a weight is not positive.

        References:
            G. Dahlquist and R. Jeltsch (1979). Generalized disks of contractivity for explicit and
            implicit Runge-Kutta methods. TRITA-NA-7906, KTH Stockholm.
        """
        self._require_positive_weights("contractivity_radius")
        a = torch.tensor([[float(v) for v in row] for row in self.a], dtype=torch.float64)
        b = torch.tensor([float(v) for v in self.b], dtype=torch.float64)
        Ba, root = b[:, None] * a, b.sqrt()
        M = (Ba + Ba.mT - torch.outer(b, b)) / torch.outer(root, root)  # (RK2)
        return -1.0 / float(torch.linalg.eigvalsh(M)[0])

    def partner(self) -> tuple[tuple[tuple[Number, ...], ...], tuple[Number, ...]]:
        """Return the coefficients (a~, b~) of the costate's method.

            (RK3)  a~_ij = b_j - b_j a_ji / b_i,    b~ = b

        Applied to the adjoint equation p' = -(dv/dz)' p along the stages of (RK1), it gives exactly
        the gradient of the discrete step: the pair is a symplectic partitioned method.

        Returns:
            a~ (s, s), whose entries on and below the diagonal are b_j, and b~ (s,).

        Raises:
            ValueError: If a weight is not positive.

        References:
            W. Hager (2000). Runge-Kutta methods in optimal control and the transformed adjoint
            system. Numer. Math. 87. doi:10.1007/s002110000178.
            J. M. Sanz-Serna (2016). Symplectic Runge-Kutta schemes for adjoint equations, automatic
            differentiation, optimal control, and more. SIAM Review 58. doi:10.1137/151002769.
        """
        self._require_positive_weights("partner")
        a, b, s = self.a, self.b, range(self.stages)
        rows = tuple(tuple(b[j] - b[j] * a[j][i] / b[i] for j in s) for i in s)  # (RK3)
        return rows, b

    def _require_positive_weights(self, what: str) -> None:
        if not all(weight > 0 for weight in self.b):
            raise ValueError(f"{what} needs weights b that are positive, got {self.b}.")

    def _conditions(self) -> Iterator[tuple[int, str, Number, Fraction]]:
        """Yield the eight order conditions: order, name, value, and what it must be."""
        b, c = self.b, self.c
        mean = lambda values: sum(w * v for w, v in zip(b, values, strict=True))
        through = lambda values: tuple(
            sum(w * v for w, v in zip(row, values, strict=True)) for row in self.a
        )
        powers = lambda k: tuple(v**k for v in c)
        ac = through(c)
        yield 1, "sum b_i", sum(b), Fraction(1)
        yield 2, "sum b_i c_i", mean(c), Fraction(1, 2)
        yield 3, "sum b_i c_i^2", mean(powers(2)), Fraction(1, 3)
        yield 3, "sum b_i a_ij c_j", mean(ac), Fraction(1, 6)
        yield 4, "sum b_i c_i^3", mean(powers(3)), Fraction(1, 4)
        scaled = tuple(v * w for v, w in zip(c, ac, strict=True))
        yield 4, "sum b_i c_i a_ij c_j", mean(scaled), Fraction(1, 8)
        yield 4, "sum b_i a_ij c_j^2", mean(through(powers(2))), Fraction(1, 12)
        yield 4, "sum b_i a_ij a_jk c_k", mean(through(ac)), Fraction(1, 24)


def _table(name: str, order: int, below: Sequence[Sequence[str]], b: Sequence[str]) -> Tableau:
    """Return a table from the coefficients below the diagonal, one row for each stage."""
    s = len(b)
    rows = tuple(tuple(map(Fraction, row)) + (Fraction(0),) * (s - len(row)) for row in below)
    return Tableau(rows, tuple(map(Fraction, b)), order, name)


TABLEAUS = {
    table.name: table
    for table in (
        _table("euler", 1, [[]], ["1"]),
        _table("improved-euler", 2, [[], ["1"]], ["1/2", "1/2"]),
        _table("kutta3", 3, [[], ["1/2"], ["-1", "2"]], ["1/6", "2/3", "1/6"]),
        _table(
            "kutta4",
            4,
            [[], ["1/2"], ["0", "1/2"], ["0", "0", "1"]],
            ["1/6", "1/3", "1/3", "1/6"],
        ),
    )
}


def make_tableau(method: str | Tableau) -> Tableau:
    """Return the table of a method by its name, or the one given.

    Args:
        method: `"euler"`, `"improved-euler"` (Heun), `"kutta3"`, `"kutta4"`, or a `Tableau`.

    Raises:
        ValueError: If there is no method of that name.
    """
    if isinstance(method, Tableau):
        return method
    return TABLEAUS[choice("method", method, tuple(TABLEAUS))]
