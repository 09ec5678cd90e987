import numpy as np
import pytest

from lm_jax.data.synthetic import MarkovSource
from tests.helpers import source_nats, source_symbols


@pytest.fixture(scope="module")
def source():
    return MarkovSource(seed=0)


def _transition(source):
    """P[(parity, symbol), (parity, symbol)], written out state by state."""
    n = source.symbols
    matrix = np.zeros((2 * n, 2 * n))
    for parity in range(2):
        for symbol in range(n):
            row = source.probability_CSS[parity, symbol]
            matrix[parity * n + symbol, (symbol % 2) * n : (symbol % 2 + 1) * n] = row
    return matrix


def test_every_state_has_its_successors_and_none_is_rare(source):
    positive = source.probability_CSS > 0
    assert (positive.sum(-1) == 8).all()
    assert source.probability_CSS[positive].min() >= 0.1 / 8 - 1e-15
    np.testing.assert_allclose(source.probability_CSS.sum(-1), 1.0, rtol=1e-14)


def test_stationary_distribution_is_the_fixed_point_of_the_chain(source):
    matrix = _transition(source)
    uniform = np.full(2 * source.symbols, 0.5 / source.symbols)
    by_power = uniform @ np.linalg.matrix_power(matrix, 4096)
    np.testing.assert_allclose(source.stationary_CS.ravel(), by_power, atol=1e-13)


def test_entropy_rate_is_the_growth_of_the_exact_block_entropy():
    """H(X_1..X_n) - H(X_1..X_n-1) by enumerating all blocks of a small source."""
    source = MarkovSource(seed=3, symbols=6, successors=2)
    blocks: dict[tuple[int, ...], np.ndarray] = {
        (symbol,): source.stationary_CS[:, symbol] for symbol in range(6)
    }
    entropies = []
    for _ in range(8):
        p = np.array([weight.sum() for weight in blocks.values()])
        entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum())
        longer = {}
        for block, weight_C in blocks.items():
            for following in range(6):
                mass = (weight_C * source.probability_CSS[:, block[-1], following]).sum()
                if mass > 0:
                    longer[*block, following] = mass * np.eye(2)[block[-1] % 2]
        blocks = longer
    assert entropies[-1] - entropies[-2] == pytest.approx(source.entropy_rate, abs=1e-12)


def test_entropy_rate_is_learnable(source):
    assert 1.5 < source.entropy_rate < 2.0


def test_samples_cost_the_entropy_rate(source):
    nats = source_nats(source, source.sample(200_000, seed=5))[2:]
    error = nats.std() / np.sqrt(len(nats))
    assert abs(nats.mean() - source.entropy_rate) < 4 * error
    assert error < 0.003


def test_nats_of_the_start_sum_to_one_over_all_continuations(source):
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), -1).reshape(-1, 2)
    total = sum(np.exp(-source_nats(source, pair).sum()) for pair in pairs[:2560])
    expected = source.stationary_CS.sum(0)[:10].sum()
    assert total == pytest.approx(expected, rel=1e-12)


def test_nats_of_an_impossible_step_are_infinite(source):
    impossible = int(np.flatnonzero(source.probability_CSS[0, 7] == 0)[0])
    assert source_nats(source, np.array([2, 7, impossible]))[2] == np.inf


def test_both_positions_matter(source):
    """A model of the current symbol alone must lose measurably."""
    pair_SS = (source.stationary_CS[..., None] * source.probability_CSS).sum(0)
    conditional = pair_SS / pair_SS.sum(-1, keepdims=True)
    bigram = -(pair_SS[pair_SS > 0] * np.log(conditional[pair_SS > 0])).sum()
    assert bigram > source.entropy_rate + 0.3


def test_first_symbols_have_the_stationary_distribution(source):
    first = [source.sample(1, (9, i))[0] for i in range(3000)]
    counts = np.bincount(first, minlength=256)
    expected = 3000 * source.stationary_CS.sum(0)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 5 * np.sqrt(2 * 255)


def test_seeds_decide_everything(source):
    again = MarkovSource(seed=0)
    np.testing.assert_array_equal(source.sample(1000, 4), again.sample(1000, 4))
    assert not np.array_equal(source.sample(1000, 4), source.sample(1000, 5))
    assert MarkovSource(seed=1).entropy_rate != source.entropy_rate


def test_text_round_trip(source):
    symbols = source.sample(5000, seed=1)
    text = source.to_text(symbols)
    assert len(text) == 5000
    np.testing.assert_array_equal(source_symbols(text), symbols)
    letters = source.to_text(np.arange(256))
    assert len(set(letters)) == 256
    assert letters.isalpha()


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_sequences(source, length):
    symbols = source.sample(length, seed=2)
    assert len(symbols) == length
    assert len(source_nats(source, symbols)) == length


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="successors=9"):
        MarkovSource(symbols=8, successors=9)
