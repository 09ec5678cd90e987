"""A text source whose entropy rate is known exactly: the lowest loss that any model can reach."""

import bisect
from collections.abc import Iterator

import numpy as np

FIRST_CHARACTER = 0x100  # symbol s is written as the letter U+0100 + s
MAX_SYMBOLS = 256  # U+0100 to U+01FF are all letters


class MarkovSource:
    """Markov chain over symbols in which the symbol before the current one matters as well.

    The state is (parity of the previous symbol, current symbol). Each state has `successors`
    possible next symbols, with probabilities drawn from a flat Dirichlet distribution and mixed
    with a tenth of uniform, so that none is too rare to be learnt. One successor of every symbol
    follows a random cycle through all symbols, so the stationary distribution is unique.

    `entropy_rate`, nats per symbol, is the mean entropy of a state's successors under it.
    """

    def __init__(self, seed: int = 0, symbols: int = MAX_SYMBOLS, successors: int = 8) -> None:
        """Draws the transition probabilities from `seed`.

        Raises:
            ValueError: if the sizes do not fit each other.
        """
        if not 2 <= successors <= symbols <= MAX_SYMBOLS:
            raise ValueError(
                f"MarkovSource(symbols={symbols}, successors={successors}) must satisfy "
                f"2 <= successors <= symbols <= {MAX_SYMBOLS}."
            )
        rng = np.random.default_rng(seed)
        self.symbols = symbols
        order = rng.permutation(symbols)
        cycle = np.empty(symbols, np.int64)
        cycle[order] = np.roll(order, -1)
        # C: parity of the symbol before, S: symbol, K: successor.
        ranks_CSS = rng.random((2, symbols, symbols))
        ranks_CSS[:, np.arange(symbols), cycle] = -1.0
        next_CSK = np.argsort(ranks_CSS, axis=-1)[..., :successors]
        dirichlet_CSK = rng.dirichlet(np.ones(successors), size=(2, symbols))
        probability_CSK = 0.9 * dirichlet_CSK + 0.1 / successors
        self.probability_CSS = np.zeros((2, symbols, symbols))
        np.put_along_axis(self.probability_CSS, next_CSK, probability_CSK, axis=-1)
        self._successors = next_CSK.tolist()
        # The last boundary is left out: it may round below 1.
        self._boundaries = np.cumsum(probability_CSK, axis=-1)[..., :-1].tolist()
        self.stationary_CS = self._stationary()
        entropy_CS = -(probability_CSK * np.log(probability_CSK)).sum(-1)
        self.entropy_rate = float((self.stationary_CS * entropy_CS).sum())

    def _stationary(self) -> np.ndarray:
        """Solves pi P = pi, sum(pi) = 1 over the 2 x symbols states."""
        n = self.symbols
        parity = np.arange(n) % 2
        transition = np.zeros((2, n, 2, n))
        transition[:, np.arange(n), parity, :] = self.probability_CSS
        equations = transition.reshape(2 * n, 2 * n).T - np.eye(2 * n)
        equations[-1] = 1.0
        solution = np.linalg.solve(equations, np.eye(2 * n)[-1])
        stationary = np.maximum(solution, 0.0).reshape(2, n)
        return stationary / stationary.sum()

    def sample(self, n: int, seed: int | tuple[int, ...]) -> np.ndarray:
        """A stretch of `n` symbols, int32, whose first state has the stationary distribution."""
        rng = np.random.default_rng(seed)
        start = rng.choice(2 * self.symbols, p=self.stationary_CS.ravel())
        parity, symbol = divmod(int(start), self.symbols)
        sequence = [symbol]
        for uniform in rng.random(max(n - 1, 0)).tolist():
            place = bisect.bisect(self._boundaries[parity][symbol], uniform)
            parity, symbol = symbol & 1, self._successors[parity][symbol][place]
            sequence.append(symbol)
        return np.array(sequence[:n], np.int32)

    def documents(self, count: int, length: int, seed: int) -> Iterator[str]:
        """`count` independent documents of `length` symbols each, as text."""
        for index in range(count):
            yield self.to_text(self.sample(length, (seed, index)))

    def to_text(self, symbols: np.ndarray) -> str:
        """One letter a symbol."""
        return (np.asarray(symbols).astype("<u4") + FIRST_CHARACTER).tobytes().decode("utf-32-le")
