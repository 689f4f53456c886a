"""Variables that are equal or opposite, and linear systems over two elements on them."""

Variable = int


class Classes:
    """Union-find over variables with a parity: two members of a class are equal or opposite."""

    def __init__(self) -> None:
        self._parent: dict[Variable, Variable] = {}
        self._bit: dict[Variable, int] = {}
        self.conflicts: set[Variable] = set()  # roots of classes in which one is its own opposite

    def find(self, x: Variable) -> tuple[Variable, int]:
        """The root of a variable's class, and whether the variable is its opposite."""
        path, bit = [], 0
        while x in self._parent:
            path.append(x)
            bit ^= self._bit[x]
            x = self._parent[x]
        total = bit
        for y in path:  # compress
            own = self._bit[y]
            self._parent[y], self._bit[y] = x, total
            total ^= own
        return x, bit

    def root(self, x: Variable) -> Variable:
        return self.find(x)[0]

    def unite(self, x: Variable, y: Variable, opposite: int = 0) -> None:
        (a, p), (b, q) = self.find(x), self.find(y)
        if a == b:
            if p ^ q ^ opposite:
                self.conflicts.add(a)
            return
        self._parent[a], self._bit[a] = b, p ^ q ^ opposite
        if a in self.conflicts:
            self.conflicts.add(b)


class Signs(Classes):
    """Unknowns over two elements, some of them equal, with sums of them that must be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[tuple[Variable, ...]] = []
        self.zeros: set[Variable] = set()


def nonzero_solution(equations: list[list[Variable]], wanted: set[Variable]) -> set[Variable]:
    """A solution of equations `sum of variables = 0` over two elements, nonzero on `wanted`."""
    order = {x: i for i, x in enumerate(sorted({x for row in equations for x in row} | wanted))}
    pivots: dict[int, int] = {}
    for row in equations:
        bits = 0
        for x in row:
            bits ^= 1 << order[x]
        for pivot, other in pivots.items():
            if bits >> pivot & 1:
                bits ^= other
        if bits:
            pivot = bits.bit_length() - 1
            for p, other in pivots.items():
                if other >> pivot & 1:
                    pivots[p] = other ^ bits
            pivots[pivot] = bits
    names = {i: x for x, i in order.items()}
    for free in range(len(order)):
        if free in pivots:
            continue
        chosen = {free} | {p for p, bits in pivots.items() if bits >> free & 1}
        solution = {names[i] for i in chosen}
        if solution & wanted:
            return solution
    return set()
